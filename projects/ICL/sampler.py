"""Batches of a fixed number of clusters that need not divide the images of a batch."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastreid_uns.data.camera_sampler import OnePerCameraSampler
from fastreid_uns.errors import InvalidValue
from fastreid_uns.registry import SAMPLER_REGISTRY


@SAMPLER_REGISTRY.register()
class IrregularSampler(OnePerCameraSampler):
    """Batches of P clusters, of each as many images as of the others or one fewer.

    The images of a cluster are drawn as in `OnePerCameraSampler`. Clusters come in random order, so chance decides
    which of them give the images that are left over.

    Args:
        where: length, seed, rank, world; see `Sampler`.
        batch_size: images of one step over all processes.
        clusters: P.
        camera_aware: off, all images count as of one camera.

    Raises:
        ValueError: P is not in 1..batch_size, or the processes do not divide the batch.

    Source: Tang and Jo (ICL), batches of 32 images with P = 12; the paper does not say how they are drawn.
    """

    def __init__(self, *where: Any, batch_size: int = 32, clusters: int = 12, camera_aware: bool = True) -> None:
        if not 1 <= clusters <= batch_size:
            raise InvalidValue(
                f"DATALOADER.SAMPLER.CLUSTERS is {clusters} for a BATCH_SIZE of {batch_size}; 1 to that many clusters "
                f"are accepted. Change one of them."
            )
        super().__init__(*where, batch_size=batch_size, num_instances=1, camera_aware=camera_aware)
        self.sizes = batch_size // clusters + (np.arange(clusters) < batch_size % clusters)
