"""Contrast within the batch of all processes: every positive on its own, and the single pair to compare it with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import at_least_float32
from fastreid_uns.registry import LOSS_REGISTRY
from fastreid_uns.utils.comm import all_gather, all_gather_with_gradient

REDUCTIONS = ("mean", "sum")


@LOSS_REGISTRY.register()
class MorePositivesLoss(nn.Module):
    """Each row against each other row of its cluster, with the rows of all other clusters as negatives.

    The other positives stand in no denominator, so that positives do not compete. Gradients reach both rows of a pair.

    Args:
        temperature: similarities are divided by it, > 0.
        positives: over the positives of an anchor: `mean`, or `sum` as eq. 4 is printed. They differ in the weight of
            anchors with many positives. Anchors always count alike, those without a positive as zero.

    Raises:
        ValueError: temperature or reduction out of range.

    Source: TMP, eq. 3 and 4; `positives` mean as in the program of its first author. Memory: two matrices of
    rows x rows of the batch.
    """

    def __init__(self, *, temperature: float = 0.05, positives: str = "mean") -> None:
        super().__init__()
        _check_temperature(self, temperature)
        if positives not in REDUCTIONS:
            raise InvalidValue(
                f"MorePositivesLoss: POSITIVES is {positives!r}; accepted: {', '.join(REDUCTIONS)}. Change it."
            )
        self.temperature = temperature
        self.positives = positives

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        """Scalar; feats (R,D) unit length, labels (R,): the rows of this process."""
        feats, labels = _gathered(feats, labels)
        logits = _logits(feats, self.temperature)
        same = labels[:, None] == labels[None]
        positive = same & ~_diagonal(feats)
        # log(e^p + sum of e^n) - p = softplus(log sum of e^n - p); from 50 on the difference is below float64
        losses = F.softplus(_lse_without(logits, same)[:, None] - logits, threshold=50) * positive
        rows = losses.sum(1)
        if self.positives == "mean":
            rows = rows / positive.sum(1).clamp_min(1)
        return rows.mean()


@LOSS_REGISTRY.register()
class SinglePairLoss(nn.Module):
    """Each row against the other view of its image, with every other row as a negative, whatever its cluster.

    Several further views of an image are averaged; they stand in each other's denominator. Without one a row is zero.

    Args:
        temperature: similarities are divided by it, > 0.

    Raises:
        ValueError: temperature out of range.

    Source: TMP, eq. 2 (Chen et al. 2020, SimCLR).
    """

    def __init__(self, *, temperature: float = 0.05) -> None:
        super().__init__()
        _check_temperature(self, temperature)
        self.temperature = temperature

    def forward(self, feats: Tensor, index: Tensor) -> Tensor:
        """Scalar; feats (R,D) unit length, index (R,) image of each: the rows of this process."""
        feats, index = _gathered(feats, index)
        logits = _logits(feats, self.temperature)
        self_pair = _diagonal(feats)
        other_view = (index[:, None] == index[None]) & ~self_pair
        losses = (_lse_without(logits, self_pair)[:, None] - logits) * other_view
        return (losses.sum(1) / other_view.sum(1).clamp_min(1)).mean()


def _check_temperature(loss: nn.Module, temperature: float) -> None:
    if temperature <= 0:
        raise InvalidValue(
            f"{type(loss).__name__}: TEMPERATURE is {temperature}; a number above 0 is accepted. Raise it."
        )


def _gathered(feats: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Features, with gradient, and ids of the rows of all processes."""
    return all_gather_with_gradient(at_least_float32(feats)), all_gather(ids, equal=True)


def _logits(feats: Tensor, temperature: float) -> Tensor:
    with torch.autocast(feats.device.type, enabled=False):
        return feats @ feats.T / temperature


def _diagonal(feats: Tensor) -> Tensor:
    return torch.eye(len(feats), dtype=torch.bool, device=feats.device)


def _lse_without(logits: Tensor, left_out: Tensor) -> Tensor:
    """(R,) log of the sum of exponentials of each row; a row that is left out as a whole gives a very low number."""
    lowest = torch.finfo(logits.dtype).min / 2
    return logits.masked_fill(left_out, lowest).logsumexp(1)
