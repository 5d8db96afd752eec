"""How well clusters agree with true identities: for the log, never for training."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue


def cluster_quality(labels: Tensor, identities: Tensor) -> dict[str, float]:
    """Agreement of a clustering with the truth.

    Only images count that stand in a cluster and whose identity is known; outliers (label -1) are left out of all
    three numbers, so that a clustering may look pure because it leaves much out: read them beside the outlier count.

    Args:
        labels: (N,) int64, -1 outlier.
        identities: (N,) int64, -1 unknown.

    Returns:
        `ARI` (adjusted Rand index, at most 1, 0 = chance), `NMI` (normalised mutual information, arithmetic mean) and
        `purity` (share of images whose identity is the most frequent of their cluster); empty where nothing counts.

    Raises:
        ValueError: row counts that disagree.
    """
    if len(labels) != len(identities):
        raise InvalidValue(
            f"cluster_quality: {len(labels)} labels for {len(identities)} identities; both count the training images. "
            f"Pass labels in the order of the training set."
        )
    labels, identities = labels.cpu(), identities.cpu()
    known = (labels >= 0) & (identities >= 0)
    if not known.any():
        return {}
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    found, truth = labels[known], identities[known]
    pairs, count = torch.stack([found, truth]).unique(dim=1, return_counts=True)
    largest = torch.zeros(int(found.max()) + 1, dtype=torch.long).scatter_reduce_(0, pairs[0], count, "amax")
    return {
        "ARI": float(adjusted_rand_score(truth.numpy(), found.numpy())),
        "NMI": float(normalized_mutual_info_score(truth.numpy(), found.numpy())),
        "purity": largest.sum().item() / len(found),
    }
