"""Centroids that stay as they are during an epoch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_uns.modeling.memory import Memory, source_rows
from fastreid_uns.registry import MEMORY_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels


@MEMORY_REGISTRY.register()
class CentroidMemory(Memory):
    """One row for each source class and each cluster: the plain mean of its unit features, at most of unit length.

    Rows change at a clustering only.

    Args:
        dim: D, length of a row.
        temperature: divides the similarities, > 0.

    Raises:
        ValueError: temperature out of range.

    Source: Chen et al. 2021 (ICE), official trainer: centroids are not brought to unit length.
    """

    moves = False

    def __init__(self, dim: int, *, temperature: float = 0.5) -> None:
        super().__init__(dim, momentum=1.0, temperature=temperature)

    @torch.no_grad()
    def reset(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Rows = centroids of the source classes, then the means of the clusters."""
        labels = pseudo.labels.to(bank.feats.device)
        kept = labels >= 0
        total = bank.feats.new_zeros(pseudo.num_clusters, bank.feats.shape[1], dtype=torch.float32)
        total.index_add_(0, labels[kept], bank.feats[kept].float())
        means = total / pseudo.sizes.to(total)[:, None]
        self.features = torch.cat([*source_rows(bank), means]).to(self.features.device)

    def rows(self, batch: Batch) -> Tensor:
        """(B,) the label of each image."""
        return batch.labels
