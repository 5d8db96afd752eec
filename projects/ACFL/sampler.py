"""Pairs of images of one cluster."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from fastreid_uns.data.samplers import RandomSampler, Sampler
from fastreid_uns.registry import SAMPLER_REGISTRY
from fastreid_uns.structures import PseudoLabels


@SAMPLER_REGISTRY.register()
class PartnerSampler(Sampler):
    """Batches of pairs: an image, then its partner, drawn uniformly from the other images of its cluster.

    The first images are passes over all clustered images in random order. An image that is alone in its cluster is its
    own partner.

    Args:
        length, seed, rank, world: see `Sampler`.
        batch_size: images of one step over all processes, both of each pair counted.

    Source: ACFL, algorithm 1, lines 5 and 9, taken literally.
    """

    def __init__(self, length: int, seed: int, rank: int, world: int, *, batch_size: int = 128) -> None:
        super().__init__(length, seed, rank, world, batch_size=batch_size, group=2)
        self._first = RandomSampler(length, seed, 0, 1, batch_size=batch_size // 2)

    def plan(self, rng: np.random.Generator, pseudo: PseudoLabels, cameras: Tensor) -> np.ndarray:
        """See `Sampler.plan`."""
        self._first.length = self.length
        first = self._first.plan(rng, pseudo, cameras)
        labels, sizes = pseudo.labels.numpy(), pseudo.sizes.numpy()
        order = np.argsort(labels, kind="stable")
        start = (labels < 0).sum() + np.cumsum(sizes) - sizes
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        cluster = labels[first]
        own = place[first] - start[cluster]
        drawn = (rng.random(first.shape) * (sizes[cluster] - 1)).astype(np.int64)
        drawn += (drawn >= own) & (sizes[cluster] > 1)
        partner = order[start[cluster] + drawn]
        return np.stack([first, partner], axis=2).reshape(self.length, self.batch_size)
