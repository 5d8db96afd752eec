"""Hard person features and hard images: gradient ascent on the losses of each query."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_uns.errors import InvalidValue

SIDES = ("both", "positive", "negative", "none")
SPHERES = ("none", "step", "tangent", "end")


class HardCentroids(NamedTuple):
    """The centroids c*_a = scale_a c_a + shift_a q of each query q: numbers without gradient, never vectors."""

    scale: Tensor  # (B,K)
    shift: Tensor  # (B,K)

    def products(self, feats: Tensor, easy: Tensor) -> Tensor:
        """(B,K) q . c*_a, with the gradient c*_a with respect to q.

        Args:
            feats: (B,D) q.
            easy: (B,K) q . c_a of the same q, with gradient to it.
        """
        return self.scale * easy + self.shift * (feats * feats.detach()).sum(1, keepdim=True)


@dataclass(frozen=True)
class FeatureAscent:
    """Moves all centroids up the gradient of the cross entropy of one query, for each query of a batch.

    The gradient with respect to any centroid is a multiple of q, so each hard centroid is known by two numbers and the
    ascent is a recurrence on the logits z: with r = softmax(z) - onehot(y) one step adds rate_a / temperature * r_a to
    the shift of centroid a, and rate_a |q|^2 / temperature^2 * r_a to its logit. Exact, whatever the lengths of q and
    c_a. The loss is that of the single query, never the mean of the batch, which would divide the rates by B.

    Args:
        hard: `both`, or only the `positive` or the `negative` centroids as they are after the joint ascent, the others
            as before; `none`: no ascent.
        sphere: whether hard centroids have unit length: `none` = plain ascent; `step` = put back onto the sphere after
            each step; `tangent` = that, and the loss reads c / |c|; `end` = put onto it once, after the last step. With
            `step` and `tangent` the ascent starts on the sphere as well.
        steps: V, from 0.
        rate_positive: of the own centroid, >= 0.
        rate_negative: of all others, >= 0.

    Raises:
        ValueError: an unknown word, or a number out of range.

    Source: ACFL, eq. 2 and algorithm 2; `sphere` is not in the paper.
    Time: O(B K V) beyond the product of features and centroids. Memory: O(B K).
    """

    hard: str = "both"
    sphere: str = "none"
    steps: int = 10
    rate_positive: float = 0.00035
    rate_negative: float = 0.0028

    def __post_init__(self) -> None:
        check_word("HARD", self.hard, SIDES)
        check_word("SPHERE", self.sphere, SPHERES)
        check_least("FEATURE_STEPS", self.steps)
        check_least("RATE_POSITIVE", self.rate_positive)
        check_least("RATE_NEGATIVE", self.rate_negative)

    @torch.no_grad()
    def __call__(
        self, feats: Tensor, centroids: Tensor, easy: Tensor, labels: Tensor, temperature: float
    ) -> HardCentroids:
        """The hard centroids of B queries.

        Args:
            feats: (B,D) float32 or float64, usually of unit length.
            centroids: (K,D), of any length.
            easy: (B,K) feats @ centroids.T.
            labels: (B,) own centroid.
            temperature: divides the products, > 0.
        """
        one, none = torch.ones_like(easy), torch.zeros_like(easy)
        if self.hard == "none":
            return HardCentroids(one, none)
        own = own_column(labels, easy)
        rate = torch.where(own, self.rate_positive * one, self.rate_negative) / temperature
        square = feats.pow(2).sum(1, keepdim=True)
        scale, shift = one, none
        if self.sphere in ("step", "tangent"):
            scale = scale / centroids.norm(dim=1).clamp_min(1e-12)
        products = scale * easy
        for _ in range(self.steps):
            move = rate * ((products / temperature).softmax(1) - own.to(easy))
            keep = 1 - move * products if self.sphere == "tangent" else one
            scale, shift = scale * keep, shift * keep + move
            products = scale * easy + shift * square
            if self.sphere in ("step", "tangent"):
                length = _length(scale, shift, easy, square, centroids)
                scale, shift, products = scale / length, shift / length, products / length
        if self.sphere == "end":
            length = _length(scale, shift, easy, square, centroids)
            scale, shift = scale / length, shift / length
        if self.hard != "both":
            chosen = own if self.hard == "positive" else ~own
            scale, shift = torch.where(chosen, scale, one), torch.where(chosen, shift, none)
        return HardCentroids(scale, shift)


def hard_images(
    images: Tensor, loss: Callable[[Tensor], Tensor], *, steps: int, rate: float, std: Tensor | float = 1.0
) -> Tensor:
    """Images after Z steps up the gradient of their loss, each step of one set length for each image.

    Steps are taken and measured in pixels that are normalised by `std`, and pixels are not clipped. Where the gradient
    is zero, the image stays. Neither `images` nor any gradient of a parameter is changed.

    Args:
        images: (B,3,H,W) float.
        loss: images → (B,); summed before it is differentiated, so that the batch size does not matter. Where batch
            norm couples the images, the gradient of an image contains what it does to the losses of the others.
        steps: Z.
        rate: Euclidean length of one step.
        std: of the channels, broadcast against the images.

    Returns:
        (B,3,H,W) without gradient.

    Source: ACFL, eq. 4.
    """
    images = images.detach()
    for _ in range(steps):
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(loss(images.requires_grad_()).sum(), images)
        direction = F.normalize((slope * std).flatten(1)).view(images.shape)
        images = images.detach() + rate * std * direction
    return images


def own_column(labels: Tensor, products: Tensor) -> Tensor:
    """(B,K) bool, whether a column of the products (B,K) is that of the own label (B,)."""
    return labels[:, None] == torch.arange(products.shape[1], device=products.device)


def check_word(key: str, value: str, accepted: tuple[str, ...]) -> None:
    """Raise a ValueError unless a key of `MODEL` has one of the accepted words."""
    if value not in accepted:
        raise InvalidValue(f"MODEL.{key}: {value!r} is unknown; accepted: {', '.join(accepted)}. Change it.")


def check_least(key: str, value: float, least: float = 0) -> None:
    """Raise a ValueError if a number of `MODEL` is too small."""
    if not value >= least:
        raise InvalidValue(f"MODEL.{key} is {value}; {least} or more is accepted. Raise it.")


def _length(scale: Tensor, shift: Tensor, easy: Tensor, square: Tensor, centroids: Tensor) -> Tensor:
    """(B,K) |scale c + shift q|."""
    own = centroids.pow(2).sum(1)
    return (scale.pow(2) * own + 2 * scale * shift * easy + shift.pow(2) * square).clamp_min(1e-24).sqrt()
