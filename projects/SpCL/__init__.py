"""SpCL: self-paced contrastive learning with a hybrid memory, without labels or with those of another set."""

from . import labels as labels
from . import losses as losses
from . import memory as memory
from . import model as model
