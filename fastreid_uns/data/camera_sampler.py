"""Batches in which each cluster is seen by as many cameras as possible."""

from __future__ import annotations

import logging

import numpy as np
from torch import Tensor

from fastreid_uns.data.samplers import Sampler
from fastreid_uns.registry import SAMPLER_REGISTRY
from fastreid_uns.structures import PseudoLabels

logger = logging.getLogger(__name__)


@SAMPLER_REGISTRY.register()
class OnePerCameraSampler(Sampler):
    """Batches of clusters, K images of each, one from every camera first.

    One pass visits all clusters in random order. Of each it takes a random image of every camera; if these are more
    than K, a random K of them; if they are fewer, others of the cluster follow, without repeats if there are enough. A
    cluster that has no others repeats those taken. Clusters that do not fill the last batch of a pass are left out;
    too few clusters for one batch are repeated, with a warning.

    Args:
        length, seed, rank, world: see `Sampler`.
        batch_size: images of one step over all processes.
        num_instances: K.
        camera_aware: off, all images count as of one camera. Unknown cameras (-1) count as one camera.

    Raises:
        ValueError: fewer than one instance, or the batch cannot be cut evenly.

    Source: Chen et al. 2021 (ICE), official sampler.
    """

    def __init__(
        self,
        length: int,
        seed: int,
        rank: int,
        world: int,
        *,
        batch_size: int = 32,
        num_instances: int = 4,
        camera_aware: bool = True,
    ) -> None:
        super().__init__(length, seed, rank, world, batch_size=batch_size, group=num_instances)
        self.camera_aware = camera_aware
        self.sizes = np.full(batch_size // num_instances, num_instances)  # images of each cluster of a batch
        self._warned = False

    def plan(self, rng: np.random.Generator, pseudo: PseudoLabels, cameras: Tensor) -> np.ndarray:
        """See `Sampler.plan`."""
        count, places = pseudo.num_clusters, len(self.sizes)
        if count < places and not self._warned:
            logger.warning(
                "%s: a batch has %d places for clusters and there are %d, so it holds clusters more than once. Lower "
                "DATALOADER.SAMPLER.BATCH_SIZE to avoid this.",
                type(self).__name__,
                places,
                count,
            )
            self._warned = True
        usable = count // places * places or count
        passes = np.tile(np.arange(count), (-(-self.length * places // usable), 1))
        clusters = rng.permuted(passes, axis=1)[:, :usable].ravel()[: self.length * places]
        seen = cameras.numpy() if self.camera_aware else np.zeros(len(cameras), np.int64)
        drawn = draw_one_per_camera(rng, clusters, pseudo.labels.numpy(), seen, int(self.sizes.max()))
        keep = np.arange(drawn.shape[1]) < np.tile(self.sizes, self.length)[:, None]
        return drawn[keep].reshape(self.length, self.batch_size)


def draw_one_per_camera(
    rng: np.random.Generator, clusters: np.ndarray, labels: np.ndarray, cameras: np.ndarray, count: int
) -> np.ndarray:
    """(G,count) indices of images: of each of G clusters, a random one of every camera first, then others.

    Args:
        clusters: (G,) labels that occur.
        labels: (N,) cluster of each image, -1 for outliers.
        cameras: (N,) any integers.
        count: images of each cluster.

    Time: two sorts, of the N images and of the G x cameras first choices, and count^2 vector operations over G.
    """
    order = np.lexsort((cameras, labels))
    order = order[np.searchsorted(labels[order], 0) :]  # outliers come first
    labels, cameras = labels[order], cameras[order]
    blocks = np.flatnonzero(np.r_[True, (labels[1:] != labels[:-1]) | (cameras[1:] != cameras[:-1])])
    lengths = np.diff(np.r_[blocks, len(order)])  # images of a cluster in a camera
    sizes, seen_by = np.bincount(labels), np.bincount(labels[blocks])
    starts, first_block = np.cumsum(sizes) - sizes, np.cumsum(seen_by) - seen_by

    group = np.repeat(np.arange(len(clusters)), seen_by[clusters])
    begins = np.cumsum(seen_by[clusters]) - seen_by[clusters]
    block = np.arange(len(group)) + (first_block[clusters] - begins)[group]
    place = blocks[block] + (rng.random(len(group)) * lengths[block]).astype(np.int64) - starts[clusters[group]]
    place = place[np.lexsort((rng.random(len(group)), group))]

    column, row = np.arange(count), np.arange(len(clusters))[:, None]
    cameras_taken = np.minimum(seen_by[clusters], count)[:, None]
    last = len(place) - 1
    taken = np.where(column < cameras_taken, place[np.minimum(begins[:, None] + column, last)], len(order))
    others = _draw_others(rng, sizes[clusters], taken, cameras_taken[:, 0])
    drawn = np.where(column < cameras_taken, taken, others[row, np.maximum(column - cameras_taken, 0)])
    alone = (sizes[clusters][:, None] == cameras_taken) & (cameras_taken < count)
    again = taken[row, (rng.random(drawn.shape) * cameras_taken).astype(np.int64)]
    return order[starts[clusters][:, None] + np.where(alone, again, drawn)]


def _draw_others(rng: np.random.Generator, sizes: np.ndarray, taken: np.ndarray, count_taken: np.ndarray) -> np.ndarray:
    """(G,K) places 0..size-1 that are not taken; the first K - count_taken differ if there are as many.

    Args:
        sizes: (G,) images of each cluster.
        taken: (G,K) places that are taken; beyond the first `count_taken` (G,) of a row, a number above all sizes.
    """
    count, beyond = taken.shape[1], int(taken.max()) + 1
    free = sizes - count_taken
    differ = count - count_taken <= free
    excluded = np.sort(taken, axis=1)
    picks = np.zeros_like(taken)
    for column in range(count - int(count_taken.min())):
        limit = np.maximum(np.where(differ, free - column, free), 1)
        pick = (rng.random(len(sizes)) * limit).astype(np.int64)
        for place in excluded.T:
            pick += pick >= place  # counts the places that are free
        picks[:, column] = pick
        excluded = np.sort(np.c_[excluded, np.where(differ, pick, beyond)], axis=1)
    return picks
