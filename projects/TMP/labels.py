"""k-means whose doubtful images stand alone."""

from __future__ import annotations

from typing import Any

import torch

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.base import centroids, singletons
from fastreid_uns.pseudo_labels.kmeans import KMeansLabels
from fastreid_uns.registry import PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import FeatureBank, PseudoLabels


@PSEUDO_LABEL_REGISTRY.register()
class ReliableKMeansLabels(KMeansLabels):
    """k-means by cosine similarity; an image that is not near enough to its centroid is a cluster of its own.

    Args:
        similarity: smallest cosine to the centroid of its cluster with which an image stays in it, in [-1, 1].

    Raises:
        ValueError: similarity out of range.

    Source: Fan et al. 2018 (PUL), selection of reliable images by a threshold, as compared in TMP, table 6; differs
    from PUL: the others are not left out of the epoch, and the centroid is the mean, not an image.
    """

    def __init__(self, *, similarity: float = 0.5, **keys: Any) -> None:
        super().__init__(**keys)
        if not -1 <= similarity <= 1:
            raise InvalidValue(f"PSEUDO_LABELS: SIMILARITY is {similarity}; a cosine in -1..1 is accepted. Change it.")
        self.similarity = similarity

    @torch.no_grad()
    def __call__(self, bank: FeatureBank, epoch: int) -> PseudoLabels:
        """See `PseudoLabelGenerator`; clusters come first, in their order, then the single images in theirs."""
        found = super().__call__(bank, epoch)
        near = (bank.feats.float() * found.centroids[found.labels]).sum(1) >= self.similarity
        labels = torch.full_like(found.labels, -1)
        labels[near] = found.labels[near].unique(return_inverse=True)[1]
        labels = singletons(labels)
        return PseudoLabels(labels, centroids(bank.feats, labels))
