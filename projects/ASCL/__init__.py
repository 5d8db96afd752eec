# the model, the labels and the part losses are those of PPLR
from fastreid_uns.projects import PPLR as PPLR

from . import losses as losses
