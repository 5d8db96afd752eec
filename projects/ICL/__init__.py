from . import losses as losses
from . import sampler as sampler
