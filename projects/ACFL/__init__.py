from . import memory as memory
from . import model as model
from . import sampler as sampler
from . import student as student
