"""PCL-CLIP: the image encoder of CLIP, fine-tuned by contrast with prototypes alone."""

from . import heads as heads
