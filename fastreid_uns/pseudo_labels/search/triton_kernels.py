"""The inner loop of the search on a GPU, compiled by Triton; imported only where there are both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDEST = 1024  # numbers of a row that are read at a time


def pair_distances(feats: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(P,) float32 squared distances of pairs of rows, summed in float64 and rounded once.

    Args:
        feats: (N, D) float32.
        first, second: (P,) int64 rows.
    """
    feats, first, second = feats.contiguous(), first.contiguous(), second.contiguous()
    result = torch.empty(len(first), device=feats.device)
    if len(first):
        width = feats.shape[1]
        block = min(_WIDEST, triton.next_power_of_2(width))
        with torch.cuda.device_of(feats):
            _measure[(len(first),)](feats, first, second, result, width, WIDTH=block, num_warps=4)
    return result


@triton.jit
def _measure(feats, first, second, result, width, WIDTH: tl.constexpr):
    """One pair for each program."""
    pair = tl.program_id(0).to(tl.int64)
    one = feats + tl.load(first + pair) * width
    other = feats + tl.load(second + pair) * width
    total = tl.zeros((WIDTH,), dtype=tl.float64)
    for start in range(0, width, WIDTH):
        at = start + tl.arange(0, WIDTH)
        inside = at < width
        difference = tl.load(one + at, mask=inside, other=0.0).to(tl.float64)
        difference -= tl.load(other + at, mask=inside, other=0.0).to(tl.float64)
        total += difference * difference
    tl.store(result + pair, tl.sum(total, axis=0).to(tl.float32))
