from . import losses as losses
from . import memory as memory
from . import model as model
from . import sampler as sampler
