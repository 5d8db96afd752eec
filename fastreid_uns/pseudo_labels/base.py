"""What turns features into pseudo labels, and the centroids of its clusters."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastreid_uns.structures import FeatureBank, PseudoLabels


class PseudoLabelGenerator:
    """Clusters the images once per epoch.

    `seconds` holds the wall time of the stages of the last call: `neighbours` (until the distance is known) and
    `cluster`. `order_free` says that images in another order get the same clusters, up to their numbering. `shared`
    says that all processes may call it on the same bank at once, so that they share its loops (`utils.sharing`); the
    first alone calls it otherwise. Labels are those of the first process.
    """

    order_free: bool = True
    shared: bool = False

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, bank: FeatureBank, epoch: int) -> PseudoLabels:
        """Labels of the N images of the bank, on the device of its features.

        Raises:
            ValueError: no cluster was found, or the features are not finite.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What later epochs take from earlier ones: tensors and plain Python values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Write the wall time of the block to `seconds[stage]`."""
        begin = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - begin


@torch.no_grad()
def centroids(feats: Tensor, labels: Tensor) -> Tensor:
    """Unit-length mean of each cluster.

    Args:
        feats: (N, D) float.
        labels: (N,) clusters 0..K-1, -1 for images that count nowhere.

    Returns:
        (K, D) float32 on the device of `feats`; zero where the images of a cluster cancel out. Equal from run to run
        on the CPU; CUDA adds up in any order unless `torch.use_deterministic_algorithms` is on.
    """
    labels = labels.to(feats.device)
    kept = labels >= 0
    count = int(labels.max()) + 1 if len(labels) else 0
    total = torch.zeros((count, feats.shape[1]), device=feats.device)
    return F.normalize(total.index_add_(0, labels[kept], feats[kept].float()), dim=1)


def singletons(labels: Tensor) -> Tensor:
    """(N,) `labels` in which each outlier (-1) has become a cluster of its own, numbered after the others in order."""
    outlier = labels < 0
    first = int(labels.max()) + 1
    return torch.where(outlier, first + outlier.cumsum(0) - 1, labels)
