"""How alike photos are place by place: local descriptors of a middle stage, matched within a small window.

A pooled feature does not say where something is. Of photos that show their individuals alike placed, such as drawings
or the same side of an animal, places tell more; of photos from anywhere they tell less than nothing. Which it is shows
in the photos themselves: see `local_match`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_uns.modeling.whitening import MainDirections
from fastreid_uns.photos.view_store import ViewStore
from fastreid_uns.pseudo_labels.linkage import near_pairs

logger = logging.getLogger(__name__)

SHARE = 0.4  # of the local similarity in that of two photos, where it counts
_CELLS = 49  # of a photo, about
_DIM = 64  # of a descriptor
_WINDOW = 1  # cells by which what matches may have moved in each direction
_BLOCK = 1024  # photos or pairs at a time


@dataclass(frozen=True)
class LocalMatch:
    """Local descriptors of N photos, whose similarity counts beside the cosine of their features.

    Attributes:
        descriptors: (N, h, w, d) float16, see `local_descriptors`.
    """

    descriptors: Tensor

    def __call__(self, first: Tensor, second: Tensor, cosine: Tensor) -> Tensor:
        """(M,) float32 similarities of pairs of photos: cosines (M,), and local ones at the scale of these."""
        local = local_similarity(self.descriptors, first, second)
        return (1 - SHARE) * cosine + SHARE * (_standard(local) * _spread(cosine) + cosine.mean())


def local_match(descriptors: Tensor, feats: Tensor, groups: Tensor, reach: int) -> LocalMatch | None:
    """The descriptors if they tell more about photos than features do, else None.

    They do if, among pairs of neighbours that are equally near by their features, those of one group are more alike by
    the descriptors. That is the sign of the weight that Fisher's linear discriminant gives them between pairs of one
    group and pairs of two.

    Args:
        descriptors: of N photos.
        feats: (N, D) unit length.
        groups: (N,) int64; strict ones, that hold few photos of other individuals.
        reach: neighbours of each photo, itself included, that make pairs.
    """
    first, second, cosine = near_pairs(feats, reach)
    same = groups[first] == groups[second]
    if same.all() or not same.any():
        return None
    both = _standard(torch.stack([cosine, local_similarity(descriptors, first, second)]).double())
    means = torch.stack([both[:, same].mean(1), both[:, ~same].mean(1)])
    rest = torch.cat([both[:, same] - means[0, :, None], both[:, ~same] - means[1, :, None]], dim=1)
    weights = torch.linalg.lstsq(rest @ rest.T / len(same), (means[0] - means[1])[:, None]).solution[:, 0]
    used = bool(weights[1] > 0)
    logger.info(
        "local descriptors: %s (weight %+.2f, features %+.2f)", "used" if used else "not used", *weights.flip(0)
    )
    return LocalMatch(descriptors) if used else None


@torch.no_grad()
def local_descriptors(kept: ViewStore) -> Tensor:
    """(N, h, w, d) float16 on the CPU: what is at each place of the photos themselves, without their views.

    Means of neighbouring activations, of unit length, along the main directions of all, which are whitened half the
    way, as features are. The longer a descriptor, the more its place stands out from the usual.
    """
    found = []
    for photos in torch.arange(len(kept)).split(_BLOCK):
        maps = kept.take(photos, torch.zeros(len(photos), 1, dtype=torch.int64)).squeeze(1)
        found.append(_cells(maps).cpu())
    cells = torch.cat(found)
    main = MainDirections.of(cells.flatten(1, 2), _DIM).views
    main *= main.square().mean((0, 1)).clamp(min=1e-12).pow(-0.25)
    return main.unflatten(1, cells.shape[1:3]).half()


def _cells(maps: Tensor) -> Tensor:
    """(B, C, H, W) → (B, h, w, C), about `_CELLS` places of unit length."""
    step = max(round(math.sqrt(maps.shape[2] * maps.shape[3] / _CELLS)), 1)
    kernel = step + 1 - step % 2
    pooled = F.avg_pool2d(maps, kernel, step, kernel // 2, count_include_pad=False)
    return F.normalize(pooled, dim=1).permute(0, 2, 3, 1)


@torch.no_grad()
def local_similarity(descriptors: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(M,) float32, mean cosine of each place of a photo and the most alike one near it in the other photo.

    The mean of both ways. Places count by the length of their descriptors.

    Args:
        descriptors: (N, h, w, d).
        first, second: (M,) int64, photos of each pair.
    """
    height, width = descriptors.shape[1:3]
    values = descriptors.flatten(1, 2).float()
    length = values.norm(dim=2)
    unit = values / length.clamp(min=1e-6)[:, :, None]
    weight = length / length.sum(1, keepdim=True).clamp(min=1e-6)
    row, column = torch.arange(height * width).div(width, rounding_mode="floor"), torch.arange(height * width) % width
    near = torch.maximum((row[:, None] - row).abs(), (column[:, None] - column).abs()) <= _WINDOW
    barred = torch.zeros(near.shape).masked_fill(~near, -9.0)
    found = torch.empty(len(first))
    for rows in torch.arange(len(first)).split(_BLOCK):
        a, b = first[rows], second[rows]
        products = torch.baddbmm(barred, unit[a], unit[b].mT)
        found[rows] = ((products.amax(2) * weight[a]).sum(1) + (products.amax(1) * weight[b]).sum(1)) / 2
    return found


def _standard(values: Tensor) -> Tensor:
    """(..., M) less their mean, divided by their spread."""
    return (values - values.mean(-1, keepdim=True)) / _spread(values)


def _spread(values: Tensor) -> Tensor:
    return values.std(-1, correction=0, keepdim=True).clamp(min=1e-6)
