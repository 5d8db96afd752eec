from . import losses as losses
from . import model as model
