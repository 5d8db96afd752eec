"""The instances correlation loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import all_keys, similarity
from fastreid_uns.registry import LOSS_REGISTRY
from fastreid_uns.utils import comm

REDUCTIONS = ("sum", "row", "mean")


@LOSS_REGISTRY.register()
class CorrelationLoss(nn.Module):
    """Squared distance between the cosines of queries and keys and their target: 1 within a cluster, else -1.

    With M = F K^T, F the features and K the keys of the momentum encoder of all processes, and T = 1 where two images
    have one label (each image and its own key among them) and -1 elsewhere: |M - T|^2.

    Args:
        reduction: `sum` over all pairs, as printed; `row`: over the keys, then the mean over the queries; `mean` over
            all pairs.

    Raises:
        ValueError: unknown reduction.

    Source: Tang and Jo (ICL), instances correlation loss.
    """

    def __init__(self, *, reduction: str = "row") -> None:
        super().__init__()
        if reduction not in REDUCTIONS:
            raise InvalidValue(
                f"CorrelationLoss: REDUCTION is {reduction!r}; accepted: {', '.join(REDUCTIONS)}. Change MODEL.LOSSES."
            )
        self.reduction = reduction

    def forward(self, feats: Tensor, teacher_feats: Tensor, labels: Tensor) -> Tensor:
        """Scalar, with gradient to `feats` only; both features (B,D) unit length, labels (B,).

        Of several processes, the mean of this value is that of the whole batch.
        """
        with torch.autocast(feats.device.type, enabled=False):
            cosine = similarity(feats, all_keys(teacher_feats))
            same = labels[:, None] == comm.all_gather(labels, equal=True)
            squared = (cosine - torch.where(same, 1.0, -1.0).to(cosine)).square()
            if self.reduction == "mean":
                return squared.mean()
            rows = squared.sum(1)
            return rows.mean() if self.reduction == "row" else rows.sum() * comm.world()
