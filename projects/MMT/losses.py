"""Triplets on features before the neck: with hard targets, and with those of the other network's average."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.modeling.losses import SoftTripletLoss, at_least_float32
from fastreid_uns.registry import LOSS_REGISTRY
from fastreid_uns.utils.comm import all_gather, all_gather_with_gradient


def distances(feats: Tensor) -> Tensor:
    """(B,B) Euclidean distances, at least 1e-6 so that the gradient stays finite; feats (B,D) of any length."""
    norm = feats.pow(2).sum(1)
    with torch.autocast(feats.device.type, enabled=False):  # the difference of large numbers is small
        return (norm[:, None] + norm - 2.0 * feats @ feats.T).clamp_min(1e-12).sqrt()


@LOSS_REGISTRY.register()
class PooledTripletLoss(SoftTripletLoss):
    """`SoftTripletLoss` on the pooled features, before the neck and of any length.

    Source: Hermans et al. 2017, as Ge et al. 2020 (MMT) use it.
    """

    def forward(self, pooled: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """Scalar; pooled (B,C), labels (B,)."""
        return super().forward(pooled, labels)


@LOSS_REGISTRY.register()
class SoftTripletDistillLoss(nn.Module):
    """How much farther the hardest negative is than the hardest positive, against what the teacher says of that pair.

    With d the distances of the student and t those of the teacher, both at the hardest positive p and the hardest
    negative n of the *student*: binary cross entropy of d_p - d_n against the probability sigmoid(t_p - t_n). In the
    batch of all processes. An image is its own positive if it has no other; one without a negative contributes nothing.

    Source: Ge et al. 2020 (MMT), soft softmax-triplet loss.
    """

    def forward(self, pooled: Tensor, teacher_pooled: Tensor, labels: Tensor) -> Tensor:
        """Scalar, with gradient to `pooled` only; both features (B,C), labels (B,)."""
        student = distances(all_gather_with_gradient(at_least_float32(pooled)))
        teacher = distances(all_gather(at_least_float32(teacher_pooled.detach()), equal=True))
        labels = all_gather(labels, equal=True)
        same = labels[:, None] == labels
        positive = student.detach().masked_fill(~same, -torch.inf).argmax(1, keepdim=True)
        negative = student.detach().masked_fill(same, torch.inf).argmin(1, keepdim=True)
        gap, wanted = ((d.gather(1, positive) - d.gather(1, negative)).squeeze(1) for d in (student, teacher))
        usable = (~same).any(1)
        losses = F.binary_cross_entropy_with_logits(gap, wanted.sigmoid(), reduction="none")
        return (losses * usable).sum() / usable.sum().clamp_min(1)
