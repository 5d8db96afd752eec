"""Neighbours as single integers: distance above, index below, so that there are no ties."""

from __future__ import annotations

import torch
from torch import Tensor


def keys_of(sq: Tensor, index: Tensor) -> Tensor:
    """Integers in the order of distance, float32 and not negative, and then of index."""
    return (sq.view(torch.int32).long() << 32) | index


def distance_of(keys: Tensor) -> Tensor:
    """float32 distances of keys."""
    return (keys >> 32).int().view(torch.float32)


def index_of(keys: Tensor) -> Tensor:
    """int64 images of keys."""
    return keys & 0xFFFFFFFF


def smallest(keys: Tensor, k: int) -> Tensor:
    """The k smallest of each row, or all, ascending."""
    return keys.topk(min(k, keys.shape[1]), dim=1, largest=False, sorted=False).values.sort(1).values
