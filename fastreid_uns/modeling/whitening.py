"""A linear map, found in closed form, that weakens the directions in which images of one individual differ."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

RIDGE = 0.03  # share of the mean variance within individuals that is added to each
_BLOCK = 4096  # rows that are multiplied at a time, in float32; blocks are summed in float64
_SPARE = 64  # directions that are sought beside the wanted ones
_ROUNDS = 4  # of the search for them


class MainDirections(NamedTuple):
    """Features of several views of images, and their parts along the main directions of all."""

    mean: Tensor  # (C,) float64, of all views
    directions: Tensor  # (C, d) float64, of unit length, the one of largest variance first
    views: Tensor  # (N, V, d) float32, along the directions, less the mean

    @classmethod
    @torch.no_grad()
    def of(cls, views: Tensor, dim: int) -> MainDirections:
        """The directions of largest variance, at most `dim`, and fewer where the views span fewer.

        Args:
            views: (N, V, C) float.
            dim: at least 1.

        Source: Halko et al. 2011, randomised subspace iteration; exact where C is at most `dim` + 64.
        """
        rows = views.flatten(0, 1)
        mean = torch.stack([part.double().sum(0) for part in rows.split(_BLOCK)]).sum(0) / len(rows)
        basis = _main_space(rows, mean, min(dim + _SPARE, rows.shape[1]))
        covariance = _sum(along.T @ along for _, along in _along(rows, mean, basis)) / len(rows)
        inner, _ = _eigenvectors(covariance, min(dim, max(len(rows) - 1, 1)))
        directions = basis @ inner
        parts = torch.cat([along for _, along in _along(rows, mean, directions)])
        return cls(mean, directions, parts.unflatten(0, views.shape[:2]))


class ViewWhitening(nn.Module):
    """Features → fewer numbers in which all directions count about alike; not of unit length.

    Before `fit` the first numbers pass as they are.

    Args:
        in_features: C.
        dim: D, at most C. Where the images of `fit` span fewer directions, the last numbers are 0.

    Attributes:
        mean: (C,) float32 buffer, what is subtracted first.
        projection: (C, D) float32 buffer.
    """

    mean: Tensor
    projection: Tensor

    def __init__(self, in_features: int, dim: int = 192) -> None:
        super().__init__()
        self.dim = min(dim, in_features)
        self.register_buffer("mean", torch.zeros(in_features))
        self.register_buffer("projection", torch.eye(in_features, self.dim))

    def forward(self, feats: Tensor) -> Tensor:
        """(..., C) → (..., D); linear, so the mean of views may be taken before or after."""
        return (feats - self.mean) @ self.projection

    @torch.no_grad()
    def fit(self, found: MainDirections, groups: Tensor | None = None) -> ViewWhitening:
        """Set the map from features of several views of each image.

        In the main directions, what differs within an individual is whitened; then the main directions of the means of
        the images are divided by the fourth root of their variance, which is half the way to full whitening. What
        differs within an individual is the covariance of view minus mean of its image, and with groups the mean of
        this one and of that of image minus mean of its group.

        Args:
            found: of at least two images, at most D directions. One view tells nothing about what differs within an
                image.
            groups: (N,) int64, images with the same number show the same individual. Those that are alone tell nothing
                about what differs within an individual.

        Source: within-class covariance normalisation (Hatch et al. 2006); the classes are the images, whose members
        are the views, and the groups.
        """
        views = found.views.double()
        count, number = views.shape[:2]
        image, means = torch.arange(count, device=views.device), views.mean(1)
        pairs = [(views.flatten(0, 1), image.repeat_interleave(number))]
        pairs += [] if groups is None else [(means, groups.to(views.device))]
        within = [_covariance_within(rows, classes) for rows, classes in pairs if len(classes.unique()) < len(classes)]
        root = _inverse_root(torch.stack(within).mean(0)) if within else torch.eye(views.shape[2]).to(views)
        means = means @ root
        outer, variance = _eigenvectors(means.T @ means / count, min(count - 1, means.shape[1]))
        matrix = found.directions @ root @ (outer / variance.pow(0.25))
        self.mean.copy_(found.mean)
        self.projection.zero_()
        self.projection[:, : matrix.shape[1]] = matrix.float()
        return self


def _main_space(rows: Tensor, mean: Tensor, width: int) -> Tensor:
    """(C, width) float64 orthonormal, whose span holds nearly all variance that so many directions can hold."""
    if width == rows.shape[1]:
        return torch.eye(width, dtype=torch.float64, device=rows.device)
    basis = torch.randn(rows.shape[1], width, generator=torch.Generator().manual_seed(0)).to(rows.device)
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(_sum(part.T @ along for part, along in _along(rows, mean, basis))).Q
    return basis


def _along(rows: Tensor, mean: Tensor, directions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Blocks of rows less the mean, and their parts along directions, both float32."""
    for part in rows.split(_BLOCK):
        centred = (part.double() - mean).float()
        yield centred, centred @ directions.float()


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """In float64."""
    return functools.reduce(torch.add, (part.double() for part in parts))


def _covariance_within(rows: Tensor, classes: Tensor) -> Tensor:
    """(C, C) covariance of rows minus the mean of their class, of whose (N,) numbers at least two are equal."""
    _, place = classes.unique(return_inverse=True)
    sums = torch.zeros(int(place.max()) + 1, rows.shape[1], dtype=rows.dtype, device=rows.device)
    means = sums.index_add_(0, place, rows) / place.bincount()[:, None]
    rest = rows - means[place]
    return rest.T @ rest / (len(rows) - len(means))


def _eigenvectors(covariance: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(C, d) unit length and (d,) variances of the directions of largest variance, at most `dim`, at least one.

    Directions without variance are left out.
    """
    variance, directions = torch.linalg.eigh(covariance)
    variance, directions = variance.flip(0)[:dim], directions.flip(1)[:, :dim]
    kept = variance > variance[0].clamp(min=0) * 1e-9
    kept[0] = True
    return directions[:, kept], variance[kept].clamp(min=1e-12)


def _inverse_root(covariance: Tensor) -> Tensor:
    """Inverse square root of a covariance with `RIDGE` of its mean variance added to each direction."""
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    variance, directions = torch.linalg.eigh(covariance + ridge * identity)
    return (directions * variance.rsqrt()) @ directions.T
