"""ISE: cluster contrast with support samples between an image and the nearest foreign cluster."""

from . import losses as losses
from . import model as model
