from . import labels as labels
