"""Part-guided label refinement, agreement-aware label smoothing and the triplet loss on features of any length."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import SoftTripletLoss, at_least_float32
from fastreid_uns.registry import LOSS_REGISTRY


def refined_targets(part_logits: Tensor, agreement: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Share `beta` of the label, and the rest what the parts predict, weighted by their agreement.

    Args:
        part_logits: (B, P, K) float.
        agreement: (B, P) in [0, 1].
        labels: (B,) in 0..K-1.
        beta: share of the label, in [0, 1].

    Returns:
        (B, K), rows sum to 1, without gradient.

    Source: Cho et al. 2022 (PPLR), part-guided label refinement: y = beta * onehot + (1 - beta) * sum_p w_p q_p with w
    the softmax over parts of the agreement and q_p the prediction of part p.
    """
    predictions = at_least_float32(part_logits.detach()).softmax(2)
    weights = agreement.detach().to(predictions.dtype).softmax(1)
    ensemble = (weights[:, :, None] * predictions).sum(1)
    onehot = F.one_hot(labels, predictions.shape[2]).to(predictions.dtype)
    return beta * onehot + (1.0 - beta) * ensemble


@LOSS_REGISTRY.register()
class RefinedLabelLoss(nn.Module):
    """Cross entropy of the global logits against `refined_targets`.

    Args:
        beta: share of the label, in [0, 1]; 1 is plain cross entropy.

    Raises:
        ValueError: beta out of range.

    Source: Cho et al. 2022 (PPLR), part-guided label refinement.
    """

    def __init__(self, *, beta: float = 0.5) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise InvalidValue(f"RefinedLabelLoss: BETA is {beta}; a share in [0, 1] is accepted. The paper uses 0.5.")
        self.beta = beta

    def forward(self, logits: Tensor, part_logits: Tensor, agreement: Tensor, labels: Tensor) -> Tensor:
        """Scalar; logits (B,K), part_logits (B,P,K), agreement (B,P), labels (B,)."""
        logits = at_least_float32(logits)
        return F.cross_entropy(logits, refined_targets(part_logits, agreement, labels, self.beta).to(logits.dtype))


@LOSS_REGISTRY.register()
class PartCrossEntropyLoss(nn.Module):
    """Mean over parts of the cross entropy of `part_logits` against `labels`.

    Args:
        smoothing: share of the target that is spread evenly over all clusters, in [0, 1).

    Raises:
        ValueError: smoothing out of range.
    """

    def __init__(self, *, smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise InvalidValue(f"{type(self).__name__}: SMOOTHING is {smoothing}; a share in [0, 1) is accepted.")
        self.smoothing = smoothing

    def forward(self, part_logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar; part_logits (B,P,K), labels (B,)."""
        return _part_cross_entropy(part_logits, labels, self.smoothing)


@LOSS_REGISTRY.register()
class AgreementSmoothingLoss(nn.Module):
    """Cross entropy of the parts, whose labels are smoothed the more, the less a part agrees with the whole.

    With c the agreement of a part, mean over batch and parts of c * CE(prediction, label) + (1 - c) * KL(uniform ||
    prediction). In the first epochs, while features know little, the smoothing is the same for all.

    Args:
        smoothing: share that is spread evenly in the first epochs, in [0, 1).
        first_epochs: epochs before the agreement counts, from 0.

    Raises:
        ValueError: a parameter out of range.

    Source: Cho et al. 2022 (PPLR), agreement-aware label smoothing.
    """

    def __init__(self, *, smoothing: float = 0.1, first_epochs: int = 5) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise InvalidValue(f"{type(self).__name__}: SMOOTHING is {smoothing}; a share in [0, 1) is accepted.")
        if first_epochs < 0:
            raise InvalidValue(f"AgreementSmoothingLoss: FIRST_EPOCHS is {first_epochs}; 0 or more are accepted.")
        self.smoothing = smoothing
        self.first_epochs = first_epochs

    def forward(self, part_logits: Tensor, agreement: Tensor, labels: Tensor, epoch: int) -> Tensor:
        """Scalar; part_logits (B,P,K), agreement (B,P), labels (B,), epoch of the run, from 0."""
        if epoch < self.first_epochs:
            return _part_cross_entropy(part_logits, labels, self.smoothing)
        log_prediction = at_least_float32(part_logits).log_softmax(2)
        at_label = labels[:, None, None].expand(-1, log_prediction.shape[1], 1)
        cross_entropy = -log_prediction.gather(2, at_label).squeeze(2)
        divergence = -log_prediction.mean(2) - math.log(log_prediction.shape[2])
        agreement = agreement.to(log_prediction.dtype)
        return (agreement * cross_entropy + (1.0 - agreement) * divergence).mean()


@LOSS_REGISTRY.register()
class UnnormalizedTripletLoss(SoftTripletLoss):
    """`SoftTripletLoss` on the features before unit length.

    Source: Hermans et al. 2017, as Cho et al. 2022 (PPLR) use it.
    """

    def forward(self, unnormalized: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """Scalar; unnormalized (B,D), labels (B,)."""
        return super().forward(unnormalized, labels)


def _part_cross_entropy(part_logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean over batch and parts; every part has the label of its image."""
    rows = at_least_float32(part_logits).flatten(0, 1)
    return F.cross_entropy(rows, labels.repeat_interleave(part_logits.shape[1]), label_smoothing=smoothing)
