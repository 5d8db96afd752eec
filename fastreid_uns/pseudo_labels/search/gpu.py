"""Nearest neighbours by float32 products and a measurement of what they choose, where no compiled loop reaches."""

from __future__ import annotations

import torch
from torch import Tensor

SPARE = 8  # candidates beside the k nearest, where they are not told by a bound


def search_by_rows(feats: Tensor, k: int, block: int, groups: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The search where no compiled loop reaches: more than k by float32 products, the k nearest of them measured.

    All blocks; a pair is ranked by one integer, bits of the distance above and index below, so there are no ties. Of
    images that products cannot tell from the k-th nearest, `SPARE` are measured, those of lower index first. Products
    are those of rows less their mean, which are the shorter, the more alike the images are.
    """
    ids = torch.arange(len(feats), device=feats.device)
    centred = feats - feats.mean(0)
    norms = torch.cat([rows.square().sum(1) for rows in centred.split(block)])
    nearest, farthest = [], []
    for row0 in range(0, len(feats), block):
        above, rows = centred[row0 : row0 + block], ids[row0 : row0 + block]
        best = torch.empty((len(rows), 0), dtype=torch.int64, device=feats.device)
        far = torch.zeros(len(rows), device=feats.device)
        for col0 in range(0, len(feats), 8 * block):
            beside, columns = centred[col0 : col0 + 8 * block], ids[col0 : col0 + 8 * block]
            sq = torch.addmm(norms[columns], above, beside.T, alpha=-2).add_(norms[rows, None]).clamp_(min=0)
            far = torch.maximum(far, sq.amax(1))
            if groups is not None:
                sq.masked_fill_(groups[rows, None] == groups[columns], torch.inf)
            elif col0 <= row0 < col0 + 8 * block:  # the image itself needs no search
                sq[:, row0 - col0 : row0 - col0 + len(rows)].fill_diagonal_(torch.inf)
            best = smallest(torch.cat([best, _keys_of_nearest(sq, columns, k + SPARE)], 1), k + SPARE)
        nearest.append(_measured(feats, rows, best & 0xFFFFFFFF, k, groups))
        farthest.append(far)
    keys = torch.cat(nearest)
    return (keys >> 32).int().view(torch.float32), keys & 0xFFFFFFFF, torch.cat(farthest)


def keys_of(sq: Tensor, index: Tensor) -> Tensor:
    """Integers in the order of distance, float32 and not negative, and then of index."""
    return (sq.view(torch.int32).long() << 32) | index


def smallest(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[1]), dim=1, largest=False).values


def _keys_of_nearest(sq: Tensor, columns: Tensor, k: int, group: int = 16) -> Tensor:
    """Keys of the k nearest of each row, from those k groups of neighbouring columns that hold the nearest images."""
    width = sq.shape[1] // group * group
    tail = keys_of(sq[:, width:], columns[width:])
    if not width:
        return tail
    grouped = sq[:, :width].unflatten(1, (-1, group))
    groups = torch.arange(grouped.shape[1], device=sq.device)
    chosen = smallest(keys_of(grouped.amin(2), groups), k) & 0xFFFFFFFF
    picked = grouped.gather(1, chosen[:, :, None].expand(-1, -1, group))
    return torch.cat([keys_of(picked, columns[:width].unflatten(0, (-1, group))[chosen]).flatten(1), tail], 1)


def _measured(feats: Tensor, rows: Tensor, index: Tensor, k: int, groups: Tensor | None) -> Tensor:
    """Keys of the k nearest of some images out of their candidates (b, c), by true distances; without groups, each is
    the first of its own."""
    first = rows[:, None].expand_as(index)
    sq = pair_distances(feats, first.flatten(), index.flatten()).view(index.shape)
    if groups is not None:
        sq = sq.masked_fill(groups[first] == groups[index], torch.inf)
        return smallest(keys_of(sq, torch.where(sq.isinf(), len(feats), index)), k).sort(1).values
    keys = keys_of(sq.masked_fill(first == index, torch.inf), index)
    return torch.cat([rows[:, None], smallest(keys, k - 1).sort(1).values], 1)


def pair_distances(feats: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(P,) float32 squared distances of pairs of rows, summed in float64, where no compiled loop reaches."""
    chunk = max(1, 2**24 // feats.shape[1])
    parts = [torch.empty(0, device=feats.device)]
    for a, b in zip(first.split(chunk), second.split(chunk), strict=True):
        parts.append((feats[a].double() - feats[b].double()).square().sum(1).float())
    return torch.cat(parts)
