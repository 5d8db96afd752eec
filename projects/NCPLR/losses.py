"""Cross entropy against labels that are refined by what is predicted for the neighbours of an image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import at_least_float32
from fastreid_uns.registry import LOSS_REGISTRY
from fastreid_uns.utils.comm import all_gather

WEIGHTINGS = ("uniform", "farther", "nearer")


def neighbour_weights(
    index: Tensor, neighbours: Tensor, distance: Tensor, every: Tensor, weighting: str, temperature: float
) -> Tensor:
    """(B,R) share of each image of the batch in the prediction of an image's neighbours; rows add up to 1.

    An image that occurs several times in the batch counts once, where it occurs first.

    Args:
        index: (B,) images of this process.
        neighbours: (B,m) their neighbours, themselves among them; -1 beyond the end.
        distance: (B,m) to these.
        every: (R,) images of the batch of all processes.
        weighting: `uniform`; `farther`, the softmax of the distances over `temperature`; `nearer`, that of their
            negatives.
        temperature: > 0.
    """
    order = every.argsort(stable=True)
    ordered = every[order]
    place = torch.searchsorted(ordered, neighbours).clamp_max(len(every) - 1)
    present = (ordered[place] == neighbours) & (neighbours >= 0)
    sign = {"uniform": 0.0, "farther": 1.0, "nearer": -1.0}[weighting]
    shares = (sign * distance / temperature).masked_fill(~present, -torch.inf).softmax(1)
    weights = shares.new_zeros(len(index), len(every))
    return weights.scatter_add(1, order[place], shares.masked_fill(~present, 0.0))


def soft_cross_entropy(logits: Tensor, labels: Tensor, refined: Tensor, alpha: float) -> Tensor:
    """Mean cross entropy against alpha onehot + (1 - alpha) refined; logits and refined (B,K), labels (B,)."""
    onehot = F.one_hot(labels, logits.shape[1]).to(refined.dtype)
    return F.cross_entropy(logits, alpha * onehot + (1.0 - alpha) * refined)


@LOSS_REGISTRY.register()
class NeighbourRefinedLoss(nn.Module):
    """Cross entropy of a classifier against labels that its predictions for the neighbours refine.

    The target, without gradient, is alpha of the label of the clustering and 1 - alpha of the mean prediction for the
    neighbours of the image, as far as they are in the batch of all processes; the image is its own neighbour.

    Args:
        alpha: share of the label, in [0, 1].
        weighting: of the neighbours, `uniform`, `farther` or `nearer`, see `neighbour_weights`. The paper speaks of
            similarity; its published script weighs those that are farther away more, at most exp(0.2) = 1.22 times.
        neighbour_temperature: divides the distances, > 0.

    Raises:
        ValueError: a parameter out of range.

    Source: NCPLR, official code.
    """

    order_free = False  # an image that occurs twice is represented by its first row
    self_taught = True  # the target is made of the logits, without gradient

    def __init__(self, *, alpha: float = 0.1, weighting: str = "farther", neighbour_temperature: float = 1.0) -> None:
        super().__init__()
        _check_share("ALPHA", alpha, type(self).__name__)
        if weighting not in WEIGHTINGS:
            raise InvalidValue(
                f"{type(self).__name__}: WEIGHTING is {weighting!r}; accepted: {', '.join(WEIGHTINGS)}. Change it."
            )
        if neighbour_temperature <= 0:
            raise InvalidValue(
                f"{type(self).__name__}: NEIGHBOUR_TEMPERATURE is {neighbour_temperature}; above 0 is accepted."
            )
        self.alpha, self.weighting, self.neighbour_temperature = alpha, weighting, neighbour_temperature

    def forward(
        self, class_logits: Tensor, labels: Tensor, index: Tensor, neighbours: Tensor, neighbour_distance: Tensor
    ) -> Tensor:
        """Scalar; class_logits (B,K), labels and index (B,), neighbours and neighbour_distance (B,m)."""
        logits = at_least_float32(class_logits)
        weights = self.weights(index, neighbours, neighbour_distance)
        return soft_cross_entropy(logits, labels, expected(weights, logits), self.alpha)

    def weights(self, index: Tensor, neighbours: Tensor, distance: Tensor) -> Tensor:
        """(B,R), see `neighbour_weights`."""
        every = all_gather(index, equal=True)
        return neighbour_weights(
            index, neighbours, at_least_float32(distance), every, self.weighting, self.neighbour_temperature
        )


@LOSS_REGISTRY.register()
class GlobalLocalLoss(NeighbourRefinedLoss):
    """`NeighbourRefinedLoss` of the whole image and of its parts, whose expectations refine one another.

    With E the prediction for the neighbours by the whole image and E_p by part p: the whole image is taught by the mean
    of E and all E_p, weighted by exp(-KL(E | E_p) / kl_temperature), part p by that of E_p and E, weighted by
    exp(-KL(E_p | E) / kl_temperature).

    Args:
        alpha: share of the label in the target of the whole image.
        alpha_part: in that of a part, in [0, 1].
        kl_temperature: > 0.
        part_weight: of each part in the sum; the whole image has 1 - part_weight. In [0, 1].
        keys: those of `NeighbourRefinedLoss`.

    Raises:
        ValueError: a parameter out of range.

    Source: GL-NCPLR, official code.
    """

    def __init__(
        self, *, alpha_part: float = 0.3, kl_temperature: float = 5.0, part_weight: float = 0.2, **keys: float
    ) -> None:
        super().__init__(**keys)  # type: ignore[arg-type]
        _check_share("ALPHA_PART", alpha_part, "GlobalLocalLoss")
        _check_share("PART_WEIGHT", part_weight, "GlobalLocalLoss")
        if kl_temperature <= 0:
            raise InvalidValue(f"GlobalLocalLoss: KL_TEMPERATURE is {kl_temperature}; a number above 0 is accepted.")
        self.alpha_part, self.kl_temperature, self.part_weight = alpha_part, kl_temperature, part_weight

    def forward(  # type: ignore[override]
        self,
        class_logits: Tensor,
        part_class_logits: Tensor,
        labels: Tensor,
        index: Tensor,
        neighbours: Tensor,
        neighbour_distance: Tensor,
    ) -> Tensor:
        """Scalar; part_class_logits (B,P,K), the others as in `NeighbourRefinedLoss`."""
        whole = at_least_float32(class_logits)
        parts = at_least_float32(part_class_logits).unbind(1)
        weights = self.weights(index, neighbours, neighbour_distance)
        wanted, *by_part = (expected(weights, logits) for logits in (whole, *parts))
        trust = [self._trust(wanted, own) for own in by_part]
        total = wanted + sum(share * own for share, own in zip(trust, by_part, strict=True))
        mixed = total / (1.0 + sum(trust))
        loss = (1.0 - self.part_weight) * soft_cross_entropy(whole, labels, mixed, self.alpha)
        for logits, own in zip(parts, by_part, strict=True):
            share = self._trust(own, wanted)
            refined = (own + share * wanted) / (1.0 + share)
            loss = loss + self.part_weight * soft_cross_entropy(logits, labels, refined, self.alpha_part)
        return loss

    def _trust(self, of: Tensor, by: Tensor) -> Tensor:
        """(B,1) exp(-KL(of | by) / temperature); both (B,K)."""
        divergence = F.kl_div(by.clamp_min(1e-30).log(), of, reduction="none").sum(1, keepdim=True)
        return (-divergence / self.kl_temperature).exp()


@LOSS_REGISTRY.register()
class PartContrastLoss(nn.Module):
    """Sum over parts of the cross entropy of `part_logits`, what their memories say, against the labels.

    Source: GL-NCPLR, official code.
    """

    def forward(self, part_logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar; part_logits (B,P,K), labels (B,)."""
        rows = [F.cross_entropy(at_least_float32(logits), labels) for logits in part_logits.unbind(1)]
        return torch.stack(rows).sum()


def expected(weights: Tensor, logits: Tensor) -> Tensor:
    """(B,K) mean prediction for the neighbours, without gradient; weights (B,R), logits (B,K) of this process."""
    predictions = all_gather(logits.detach().softmax(1), equal=True)
    return weights.to(predictions.dtype) @ predictions


def _check_share(key: str, value: float, where: str) -> None:
    if not 0 <= value <= 1:
        raise InvalidValue(f"{where}: {key} is {value}; a share in [0, 1] is accepted. Change it.")
