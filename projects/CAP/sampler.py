"""Batches of camera proxies."""

from __future__ import annotations

import logging

import numpy as np
from torch import Tensor

from fastreid_uns.data.samplers import Sampler, draw_below, random_passes, whole_batches
from fastreid_uns.errors import InvalidValue
from fastreid_uns.registry import SAMPLER_REGISTRY
from fastreid_uns.structures import PseudoLabels

logger = logging.getLogger(__name__)


@SAMPLER_REGISTRY.register()
class ProxySampler(Sampler):
    """Batches of camera proxies, K images of each: images of one cluster in one camera.

    One pass visits all proxies in random order. A proxy of K images or more gives K different ones; one of fewer gives
    K from a list that holds each of its images K times, without repeats within that list. Proxies that do not fill the
    last batch of a pass are left out of it; too few proxies for one batch are repeated, with a warning.

    Args:
        length, seed, rank, world: see `Sampler`.
        batch_size: images of one step over all processes.
        num_instances: K.

    Raises:
        ValueError: fewer than one instance, or the batch cannot be cut evenly.

    Source: Wang et al. 2021 (CAP), official code.
    """

    def __init__(
        self, length: int, seed: int, rank: int, world: int, *, batch_size: int = 32, num_instances: int = 4
    ) -> None:
        if num_instances < 1:
            raise InvalidValue(f"DATALOADER.SAMPLER.NUM_INSTANCES is {num_instances}; 1 or more is accepted. Raise it.")
        super().__init__(length, seed, rank, world, batch_size=batch_size, group=num_instances)
        self.num_instances = num_instances
        self._warned = False

    def plan(self, rng: np.random.Generator, pseudo: PseudoLabels, cameras: Tensor) -> np.ndarray:
        """See `Sampler.plan`; unknown cameras (-1) count as one camera."""
        images = np.flatnonzero(pseudo.labels.numpy() >= 0)
        seen = cameras.numpy()[images]
        pairs = pseudo.labels.numpy()[images] * (seen.max() + 2) + seen
        sizes = np.unique(pairs, return_counts=True)[1]
        order = images[np.argsort(pairs, kind="stable")]
        starts = np.cumsum(sizes) - sizes
        places = self.batch_size // self.num_instances
        self._warn_of_few(len(sizes), places)
        usable = whole_batches(len(sizes), places)
        drawn = random_passes(rng, len(sizes), -(-self.length * places // usable))[:, :usable].ravel()
        drawn = drawn[: self.length * places]
        few = sizes[drawn] < self.num_instances
        copies = np.where(few, self.num_instances, 1)
        place = draw_below(rng, sizes[drawn] * copies, self.num_instances) // copies[:, None]
        return order[starts[drawn][:, None] + place].reshape(self.length, self.batch_size)

    def _warn_of_few(self, proxies: int, places: int) -> None:
        if proxies < places and not self._warned:
            logger.warning(
                "ProxySampler: a batch has %d places for proxies and there are %d, so it holds proxies more than once. "
                "Lower DATALOADER.SAMPLER.BATCH_SIZE to avoid this.",
                places,
                proxies,
            )
            self._warned = True
