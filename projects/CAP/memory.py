"""A memory whose rows are camera proxies."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_uns.modeling.memory import Memory
from fastreid_uns.modeling.proxies import Proxies, camera_means
from fastreid_uns.registry import MEMORY_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels


@MEMORY_REGISTRY.register()
class ProxyMemory(Memory):
    """One row for each cluster in each camera that sees it; made anew at each clustering.

    A call gives cosines. The temperature belongs to the losses, which pick their proxies themselves.

    Args:
        dim: D, length of a row.
        momentum: weight of the old row in an update, in [0, 1].

    Attributes:
        labels: (R,) int64, cluster of each row.
        cameras: (R,) int64, camera of each row; rows are sorted by cluster and camera.

    Raises:
        ValueError: momentum out of range.

    Source: Wang et al. 2021 (CAP), official code.
    """

    labels: Tensor
    cameras: Tensor

    def __init__(self, dim: int, *, momentum: float = 0.2) -> None:
        super().__init__(dim, momentum=momentum, temperature=1.0)
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("cameras", torch.zeros(0, dtype=torch.int64))

    def reset(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Rows = unit means of the clustered images of known cameras."""
        device = self.features.device
        feats, labels, cameras = (value.to(device) for value in (bank.feats, pseudo.labels, bank.cameras.long()))
        self.features, self.labels, self.cameras = camera_means(feats, labels, cameras)

    @property
    def proxies(self) -> Proxies:
        """The rows of this moment; an update replaces them and leaves these as they are."""
        return Proxies(self.features, self.labels, self.cameras)

    def rows(self, batch: Batch) -> Tensor:
        """(B,) the row of the cluster and the camera of each image, which must have one."""
        count = self.cameras.amax() + 1  # stays on the device
        return torch.searchsorted(self.labels * count + self.cameras, batch.labels * count + batch.cameras)
