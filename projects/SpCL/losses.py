"""The unified contrastive loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import at_least_float32
from fastreid_uns.registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class UnifiedContrastLoss(nn.Module):
    """Each image against all source classes, clusters and single images at once.

    The mean over the source images and the mean over the unlabelled images are added; a part without images costs
    nothing.

    Args:
        epsilon: added to the sum of the softmax and to the probability, as the published code does with 1e-6: its loss
            saturates at -ln(epsilon), where the gradient vanishes. 0 gives the cross entropy.

    Raises:
        ValueError: epsilon out of range.

    Source: Ge et al. 2020 (SpCL), unified contrastive loss; differs: computed in logarithms, so that no temperature
    overflows.
    """

    def __init__(self, *, epsilon: float = 0.0) -> None:
        super().__init__()
        if not 0 <= epsilon < 1:
            raise InvalidValue(f"UnifiedContrastLoss: EPSILON is {epsilon}; a number in [0, 1) is accepted. Change it.")
        self.epsilon = epsilon

    def forward(self, logits: Tensor, labels: Tensor, domains: Tensor) -> Tensor:
        """Scalar; logits (B,K), labels (B,) in 0..K-1, domains (B,) 0 = unlabelled, 1.. = sources."""
        logits = at_least_float32(logits)
        cost = self._guarded(logits, labels) if self.epsilon else F.cross_entropy(logits, labels, reduction="none")
        source = domains > 0
        return _mean_where(cost, source) + _mean_where(cost, ~source)

    def _guarded(self, logits: Tensor, labels: Tensor) -> Tensor:
        """(B,) -ln(p + epsilon), p = exp(own) / (sum of exp + epsilon)."""
        floor = logits.new_full((len(logits),), math.log(self.epsilon))
        own = logits.gather(1, labels[:, None]).squeeze(1)
        total = torch.logaddexp(logits.logsumexp(1), floor)
        return -torch.logaddexp(own - total, floor)


def _mean_where(cost: Tensor, chosen: Tensor) -> Tensor:
    return (cost * chosen).sum() / chosen.sum().clamp_min(1)
