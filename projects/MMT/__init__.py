"""MMT: two networks that teach each other by the averages of their past, after training on a labelled source."""

from . import labels as labels
from . import losses as losses
from . import mutual as mutual
from . import source as source
