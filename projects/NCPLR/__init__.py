"""NCPLR and GL-NCPLR: labels refined by what a classifier says of the neighbours that are in the batch."""

from . import labels as labels
from . import losses as losses
from . import model as model
