"""Spherical k-means in blocks, on the device of the features."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator, centroids
from fastreid_uns.pseudo_labels.search.exact import check_finite
from fastreid_uns.registry import PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import FeatureBank, PseudoLabels
from fastreid_uns.utils.precision import full_precision


@PSEUDO_LABEL_REGISTRY.register()
class KMeansLabels(PseudoLabelGenerator):
    """k-means by cosine similarity: a fixed number of clusters, no outliers, no empty cluster.

    Seeds are drawn as in k-means++ (Arthur and Vassilvitskii 2007), the same for equal `seed`, features and order of
    images; so the clusters depend on that order, as with any seeded k-means.

    Args:
        num_clusters: K, at least 1.
        iterations: rounds of assignment, at least 1; fewer if no image changes its cluster.
        seed: of the draw of the first centroids, the same in every epoch.

    Raises:
        ValueError: a parameter out of range.

    Example:
        >>> angles = torch.tensor([0.0, 0.1, 3.0, 3.1])
        >>> bank = FeatureBank(torch.stack([angles.cos(), angles.sin()], dim=1), cameras=torch.full((4,), -1))
        >>> labels = KMeansLabels(num_clusters=2)(bank, epoch=0).labels
        >>> (labels[:, None] == labels).int().tolist()
        [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    """

    order_free = False

    def __init__(self, *, num_clusters: int = 500, iterations: int = 50, seed: int = 0) -> None:
        super().__init__()
        for key, value in (("NUM_CLUSTERS", num_clusters), ("ITERATIONS", iterations)):
            if value < 1:
                raise InvalidValue(f"PSEUDO_LABELS: {key} is {value}; it must be at least 1.")
        self.num_clusters, self.iterations, self.seed = num_clusters, iterations, seed

    @torch.no_grad()
    def __call__(self, bank: FeatureBank, epoch: int) -> PseudoLabels:
        feats = bank.feats
        if len(feats) < self.num_clusters:
            raise InvalidValue(
                f"PSEUDO_LABELS: NUM_CLUSTERS is {self.num_clusters:,} for {len(feats):,} images; there cannot be "
                f"more clusters than images. Lower NUM_CLUSTERS."
            )
        check_finite(feats)
        with self.timed("cluster"), full_precision(feats.device):
            means = self._seeds(feats)
            labels = torch.full((len(feats),), -1, device=feats.device)
            for _ in range(self.iterations):
                before, labels = labels, _assign(feats, means)
                if torch.equal(before, labels):
                    break
                means = centroids(feats, labels)
        return PseudoLabels(labels, means)

    def _seeds(self, feats: Tensor) -> Tensor:
        """(K, D) rows of the bank, each drawn in proportion to its distance from those before it."""
        draws = torch.rand(self.num_clusters, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        chosen = [int(draws[0] * len(feats))]
        distance = torch.full((len(feats),), torch.inf, device=feats.device)
        for draw in draws[1:]:
            latest = feats[chosen[-1]].float()
            similarity = torch.cat([rows.float() @ latest for rows in feats.split(8192)])
            distance = torch.minimum(distance, (1 - similarity).clamp_(min=0))
            distance[chosen[-1]] = 0
            mass = distance.double().cumsum(0)
            if mass[-1] > 0:
                chosen.append(int(torch.searchsorted(mass, draw.to(mass.device) * mass[-1], right=True)))
            else:  # all other images are doubles of chosen ones
                chosen.append(len(chosen))
        return feats[chosen].float()


def _assign(feats: Tensor, means: Tensor) -> Tensor:
    """(N,) nearest of the K means; a mean without an image takes the worst placed image of a cluster of several."""
    best = [(rows.float() @ means.T).max(1) for rows in feats.split(8192)]
    labels = torch.cat([found.indices for found in best])
    sizes = torch.bincount(labels, minlength=len(means))
    empty = (sizes == 0).nonzero().flatten().tolist()
    if empty:
        for image in torch.cat([found.values for found in best]).argsort(stable=True).tolist():
            if sizes[labels[image]] > 1:
                sizes[labels[image]] -= 1
                labels[image] = empty.pop()
                if not empty:
                    break
    return labels
