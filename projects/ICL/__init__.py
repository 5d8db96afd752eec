from fastreid_uns.projects import ICE as ICE  # memory, model and the loss of an ablation

from . import losses as losses
from . import sampler as sampler
