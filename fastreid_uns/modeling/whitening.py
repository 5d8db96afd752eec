"""A linear map, found in closed form, that weakens the directions in which views of one image differ."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

RIDGE = 0.03  # share of the mean variance between views that is added to each
_BLOCK = 4096  # rows whose products are summed up in float32; blocks are summed in float64


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
    def fit(self, views: Tensor) -> ViewWhitening:
        """Set the map from features of several views of each image.

        The D main directions of all views; in them, whitening of the covariance of view minus mean of its image; then
        the main directions of these means, each divided by the fourth root of its variance, which is half the way to
        full whitening. With one view the second step is left out.

        Args:
            views: (N, V, C) float, at least two images.

        Source: within-class covariance normalisation (Hatch et al. 2006), the views of an image for its class.
        """
        count, number = views.shape[:2]
        mean = _mean(views.flatten(0, 1))
        chosen, _ = _main_directions(_covariance(views.flatten(0, 1), mean), min(self.dim, count * number - 1))
        inner = torch.cat([(part.double() - mean) @ chosen for part in views.flatten(0, 1).split(_BLOCK)])
        inner = inner.view(count, number, -1)
        means = inner.mean(1)
        if number > 1:
            rest = (inner - means[:, None]).flatten(0, 1)
            root = _inverse_root(rest.T @ rest / (count * (number - 1)))
            chosen, means = chosen @ root, means @ root
        outer, variance = _main_directions(means.T @ means / count, min(count - 1, means.shape[1]))
        matrix = chosen @ (outer / variance.pow(0.25))
        self.mean.copy_(mean)
        self.projection.zero_()
        self.projection[:, : matrix.shape[1]] = matrix.float()
        return self


@torch.no_grad()
def in_main_directions(views: Tensor, dim: int) -> Tensor:
    """(N, V, C) features of views → (N, V, d) float32: their parts along the main directions of all, at most `dim`."""
    rows = views.flatten(0, 1)
    mean = _mean(rows)
    chosen, _ = _main_directions(_covariance(rows, mean), min(dim, len(rows) - 1))
    return torch.cat([((part.double() - mean) @ chosen).float() for part in rows.split(_BLOCK)]).unflatten(
        0, views.shape[:2]
    )


def _mean(rows: Tensor) -> Tensor:
    return torch.stack([part.double().sum(0) for part in rows.split(_BLOCK)]).sum(0) / len(rows)


def _covariance(rows: Tensor, mean: Tensor) -> Tensor:
    """(C, C) float64."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in rows.split(_BLOCK):
        centred = part.float() - mean.float()
        total += centred.T @ centred
    return total / len(rows)


def _main_directions(covariance: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(C, d) unit length and (d,) variances of the directions of largest variance, at most `dim`, none without any."""
    from scipy.linalg import eigh

    width = len(covariance)
    variance, directions = eigh(covariance.cpu().numpy(), subset_by_index=[max(width - dim, 0), width - 1])
    variance, directions = variance[::-1].copy(), directions[:, ::-1].copy()
    kept = variance > max(variance[0], 0) * 1e-9
    kept[0] = True
    device = covariance.device
    return (
        torch.from_numpy(directions[:, kept]).to(device),
        torch.from_numpy(np.maximum(variance[kept], 1e-12)).to(device),
    )


def _inverse_root(covariance: Tensor) -> Tensor:
    """Inverse square root of a covariance with `RIDGE` of its mean variance added to each direction."""
    ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(len(covariance), dtype=torch.float64, device=covariance.device)
    variance, directions = torch.linalg.eigh(covariance + ridge * identity)
    return (directions * variance.rsqrt()) @ directions.T
