"""Clusters of the global features, and how far the parts of an image agree with it about its neighbours."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels
from fastreid_uns.pseudo_labels.search.exact import nearest_neighbours
from fastreid_uns.registry import PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import FeatureBank, PseudoLabels

Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


@torch.no_grad()
def cross_agreement(feats: Tensor, parts: Tensor, neighbours: int = 20, search: Search = nearest_neighbours) -> Tensor:
    """Overlap of the neighbours that an image has by its global feature and by each of its parts.

    Args:
        feats: (N, D) float.
        parts: (N, P, D) float.
        neighbours: k, nearest images by Euclidean distance, the image itself not counted; taken as N - 1 if there are
            fewer.
        search: finds neighbours as `nearest_neighbours` does, on any device.

    Returns:
        (N, P) float32 in [0, 1] on the device of `feats`: |A and B| / |A or B| of the two sets of k images.

    Raises:
        ValueError: fewer than two images, or features that are not finite.

    Source: Cho et al. 2022 (PPLR), section 3.2, the cross agreement score; differs: the image itself is left out by its
    index, where the official code drops whatever comes first.
    Memory: O(N * k) beside one block of products. Time: 1 + P searches.
    """
    if len(feats) < 2:
        raise InvalidValue(f"PSEUDO_LABELS: {len(feats)} image has no neighbours to agree on; two or more are needed.")
    k = min(neighbours, len(feats) - 1)
    whole, *found = (search(branch, k + 1)[1][:, 1:] for branch in (feats, *parts.unbind(1)))
    common = torch.stack([_common(whole, part) for part in found], dim=1).to(feats.device, torch.float32)
    return common / (2 * k - common)


def _common(first: Tensor, second: Tensor) -> Tensor:
    """(N,) how many numbers two lists (N, k) without repeats share, row by row."""
    both = torch.cat([first, second], dim=1).sort(dim=1).values
    return (both[:, 1:] == both[:, :-1]).sum(1)


@PSEUDO_LABEL_REGISTRY.register()
class AgreementLabels(DBSCANLabels):
    """DBSCAN of the global features, with `extras["agreement"]` (N, P), the `cross_agreement` of each part.

    A bank without `extras["parts"]` (N, P, D) gives plain labels without that score.

    Args:
        neighbours: k of the score, images.

    Raises:
        ValueError: a parameter out of range.
    """

    def __init__(self, *, neighbours: int = 20, **keys: Any) -> None:
        super().__init__(**keys)
        if neighbours < 1:
            raise InvalidValue(f"PSEUDO_LABELS: NEIGHBOURS is {neighbours}; it must be at least 1. The paper uses 20.")
        self.neighbours = neighbours

    def __call__(self, bank: FeatureBank, epoch: int) -> PseudoLabels:
        pseudo = super().__call__(bank, epoch)
        if "parts" not in bank.extras:
            return pseudo
        begin = time.perf_counter()
        agreement = cross_agreement(bank.feats, bank.extras["parts"], self.neighbours, self.nearest)
        self.seconds["neighbours"] += time.perf_counter() - begin
        return PseudoLabels(pseudo.labels, pseudo.centroids, {**pseudo.extras, "agreement": agreement})
