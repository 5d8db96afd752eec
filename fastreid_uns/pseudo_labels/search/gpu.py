"""The nearest neighbours on a GPU, exactly: candidates by products of 16-bit numbers, then their true distances.

The k nearest of an image are certain once the k-th true distance among its candidates is less than any image outside of
them can have: their least estimate less a bound on how far it can be off (`RoundedFeatures`). Images without that
certificate are searched again by products in float64. The operations are those of torch, so that the tests run them on
a CPU.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from fastreid_uns.pseudo_labels.search.candidates import warn_of_clumps
from fastreid_uns.pseudo_labels.search.keys import distance_of, index_of, keys_of, smallest

logger = logging.getLogger(__name__)

_SPARE = 32  # candidates beside the k nearest
_ALIGN = 128  # images are padded to a multiple of it: rows of products begin at whole lines of memory
_COLUMNS = 128  # columns of a block of products for each of its rows
_GROUP = 32  # columns of which only the least estimate is looked at first
_LONGEST = 128.0  # length of the longest row: its square is finite in 16 bits, and small numbers keep theirs
NOWHERE = 0x7F800000 << 32  # the key of distance inf
_AGAIN = 4096  # rows and columns of a block of products in float64


@torch.no_grad()
def search_by_rows(
    feats: Tensor,
    k: int,
    block: int,
    groups: Tensor | None = None,
    *,
    rows: range | None = None,
    products: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """Squared distances (M, k) and images (M, k) of the nearest of some images, as `nearest_neighbours` gives them.

    Args:
        feats: (N, D) float32, finite, contiguous, on any device.
        k: 1..N.
        block: rows of a block of products.
        groups: (N,) int; neighbours are then images of other groups only. Places that none fills have distance inf
            and image N.
        rows: the M images whose neighbours are asked for; None = all.
        products: float16 or bfloat16.
    """
    rows = range(len(feats)) if rows is None else rows
    if groups is None and k == 1:
        own = torch.arange(rows.start, rows.stop, device=feats.device)[:, None]
        return torch.zeros_like(own, dtype=torch.float32), own
    coarse = RoundedFeatures(feats, products)
    parts = (range(start, min(start + block, rows.stop)) for start in range(rows.start, rows.stop, block))
    with _sums_in_float32():
        found = [_from_candidates(feats, coarse, own, k, block, groups) for own in parts]
    if not found:
        return torch.empty((0, k), device=feats.device), torch.empty((0, k), dtype=torch.int64, device=feats.device)
    keys, certain = (torch.cat(both) for both in zip(*found, strict=True))
    doubtful = (~certain).nonzero().flatten()
    if len(doubtful):
        logger.debug("neighbours: %d of %d images are searched again in float64", len(doubtful), len(keys))
        keys[doubtful] = search_again(feats, doubtful + rows.start, keys[doubtful], groups)
    return distance_of(keys), index_of(keys)


class RoundedFeatures:
    """Rows less their mean, times a power of two, in 16 bits, and a bound on how far their products are off.

    With x the centred row, a = x rounded and r = x - a, and with n = |x|^2 as the sum of three 16-bit numbers and a
    rest d, one product gives e_ij = n_j - 2 a_i.a_j, the squared distance less n_i. It is off by
    2 |a_i.r_j + r_i.x_j| <= 2 (|a_i||r_j| + |r_i||x_j|) (Cauchy-Schwarz) and by |d_j|, both measured here in float64,
    and by the sum of K = D + 3 terms. Each term is exact in float32. A tensor core adds p >= 4 terms and the sum so far
    at a time, each cut at the last place of the largest, then rounds: an error below (p + 2) 2^-23 S, with
    S = 2 |a_i||a_j| + n_j at least the sum of absolute terms (Fasi et al. 2021). K / p such steps, and as many
    additions of parts of the sum, are off by less than (1 + 3 / p) K 2^-23 S < K 2^-22 S. A sum in float32 in any other
    order is off by less.

    Args:
        feats: (N, D) float32, finite.
        dtype: float16 or bfloat16.

    Attributes:
        rows: (N padded, K padded) dtype, a and the parts of n; images that only pad are infinitely far.
        norms: (N,) float64, n.
        errors: (N,) float64; no e_ij is farther off.
        unit: what squared distances are multiplied by here.
    """

    def __init__(self, feats: Tensor, dtype: torch.dtype) -> None:
        n, d = feats.shape
        self.mean = mean_of(feats)
        step = max(1, 2**24 // d)
        lengths = torch.cat([(part.double() - self.mean).norm(dim=1) for part in feats.split(step)])
        longest = float(lengths.max())
        scale = 2.0 ** min(math.floor(math.log2(_LONGEST / longest)), 400) if longest > 0 else 1.0
        lengths *= scale
        self.width, self.unit, self.norms = d, scale**2, lengths**2
        self.rows = torch.zeros((_multiple(n, _ALIGN), _multiple(d + 3, 8)), dtype=dtype, device=feats.device)
        kept, lost = torch.empty_like(lengths), torch.empty_like(lengths)
        for at in range(0, n, step):
            exact = (feats[at : at + step].double() - self.mean) * scale
            rounded = self.rows[at : at + len(exact), :d].copy_(exact).double()
            kept[at : at + step], lost[at : at + step] = rounded.norm(dim=1), (exact - rounded).norm(dim=1)
        rest = self.norms.clone()
        for column in range(d, d + 3):
            self.rows[:n, column] = rest
            rest -= self.rows[:n, column]
        self.rows[n:, d] = torch.inf
        largest = longest * scale
        off = 2 * (kept * lost.max() + lost * largest) + rest.abs().max()
        sums = (d + 3) * 2.0**-22 * (2 * kept * kept.max() + 1.01 * largest**2)
        slack = 2.0**-20 * (lengths + largest) ** 2  # of what follows in float32, and of rounding here
        self.errors = off + sums + slack

    def estimates(self, own: range, columns: slice) -> Tensor:
        """(b, c) float32 e_ij of some images to neighbouring ones."""
        above, beside = self.rows[own.start : own.stop] * -2, self.rows[columns]
        above[:, self.width : self.width + 3] = 1
        if above.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # torch from 2.8 on
            return torch.mm(above, beside.T, out_dtype=torch.float32)
        return above.float() @ beside.float().T


def _from_candidates(
    feats: Tensor, coarse: RoundedFeatures, own: range, k: int, block: int, groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Keys (b, k) of the nearest candidates of some images, and (b,) whether they are the nearest of all."""
    images = torch.arange(own.start, own.stop, device=feats.device)
    wanted = k - 1 if groups is None else k
    estimates, index, left = _candidates(coarse, own, wanted + _SPARE, block, groups)
    errors = coarse.errors[own.start : own.stop]
    limits = estimates[:, wanted - 1] + 2 * errors  # beyond it are none of the nearest candidates
    row, column = ((estimates <= limits[:, None]) & estimates.isfinite()).nonzero(as_tuple=True)
    sq = torch.full_like(estimates, torch.inf)
    sq[row, column] = pair_distances(feats, images[row], index[row, column])
    keys = smallest(keys_of(sq, index.where(sq.isfinite(), len(feats))), wanted)
    if groups is None:
        keys = torch.cat([images[:, None], keys], 1)
    last = distance_of(keys[:, -1]).double() * coarse.unit * (1 + 2.0**-22)
    return keys, left.isinf() | (left + coarse.norms[own.start : own.stop] - errors > last)


def _candidates(
    coarse: RoundedFeatures, own: range, count: int, block: int, groups: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimates (b, count), ascending, images (b, count), and the least estimate (b,) of those left out."""
    device = coarse.rows.device
    best, index = (
        torch.empty((len(own), 0), device=device),
        torch.empty((len(own), 0), dtype=torch.int64, device=device),
    )
    left = torch.full((len(own),), torch.inf, device=device)
    for start in range(0, len(coarse.rows), _COLUMNS * block):
        columns = slice(start, min(start + _COLUMNS * block, len(coarse.rows)))
        some, places, rest = _least(_of_others(coarse, own, columns, groups), count)
        best, index = torch.cat([best, some], 1), torch.cat([index, places + start], 1)
        left = torch.minimum(left, rest)
        if best.shape[1] > count:
            best, chosen, rest = _least(best, count)
            index, left = index.gather(1, chosen), torch.minimum(left, rest)
    return best, index, left


def _of_others(coarse: RoundedFeatures, own: range, columns: slice, groups: Tensor | None) -> Tensor:
    """Estimates (b, c), inf for the image itself or for its group, which need no search."""
    estimates = coarse.estimates(own, columns)
    if groups is None:
        estimates.diagonal(own.start - columns.start).fill_(torch.inf)
    else:
        same = groups[own.start : own.stop, None] == groups[columns]
        estimates[:, : same.shape[1]].masked_fill_(same, torch.inf)
    return estimates


def _least(values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The least values of each row, ascending, their columns, and (b,) the least of those that are left out.

    The columns are dealt out to groups, and only the groups with the least minima are looked into.
    """
    width = values.shape[1]
    if count >= width:
        return *values.sort(1), values.new_full((len(values),), torch.inf)
    spread = width // _GROUP
    if spread <= count or width % _GROUP:
        least, columns = values.topk(count + 1, dim=1, largest=False)
        return least[:, :-1], columns[:, :-1], least[:, -1]
    grouped = values.view(len(values), _GROUP, spread)
    minima, groups = grouped.amin(1).topk(count + 1, dim=1, largest=False)
    groups = groups[:, :-1]
    looked = grouped.gather(2, groups[:, None].expand(-1, _GROUP, -1)).flatten(1)
    least, places = looked.topk(count + 1, dim=1, largest=False)
    columns = places // count * spread + groups.gather(1, places % count)
    return least[:, :-1], columns[:, :-1], torch.minimum(least[:, -1], minima[:, -1])


def search_again(feats: Tensor, images: Tensor, keys: Tensor, groups: Tensor | None = None) -> Tensor:
    """Keys (F, k) of the nearest of some images; products in float64 choose what is measured, however much it is.

    Args:
        images: (F,).
        keys: (F, k) of any k others, ascending, the image itself first where there are no groups; the last distance
            limits the search.
        groups: as in `search_by_rows`.
    """
    n, first, measured = len(feats), int(groups is None), 0
    mean, ids = mean_of(feats), torch.arange(n, device=feats.device)
    norms = torch.cat([(part.double() - mean).square().sum(1) for part in feats.split(_AGAIN)])
    error = (feats.shape[1] + 8) * 2.0**-51 * 4 * norms.max()
    result = []
    for own, known in zip(images.split(_AGAIN), keys.split(_AGAIN), strict=True):
        limits = distance_of(known[:, -1]).double() * (1 + 2.0**-22) + error
        above = feats[own].double() - mean
        best = torch.full_like(known[:, first:], NOWHERE | n)
        for columns in ids.split(_AGAIN):
            sq = norms[own, None] + norms[columns] - 2 * above @ (feats[columns].double() - mean).T
            apart = own[:, None] != columns if groups is None else groups[own, None] != groups[columns]
            apart &= best[:, -1:] >= n  # not yet full of doubles of lower index
            row, column = ((sq <= limits[:, None]) & apart).nonzero(as_tuple=True)
            true = keys_of(pair_distances(feats, own[row], columns[column]), columns[column])
            best = smallest(torch.cat([best, _in_rows(true, row, len(own))], 1), best.shape[1])
            measured += len(row)
        result.append(torch.cat([known[:, :first], best], 1))
    warn_of_clumps(measured, n)
    return torch.cat(result)


def _in_rows(keys: Tensor, row: Tensor, count: int) -> Tensor:
    """(count, most of a row) keys, given row by row; what a row does not fill is larger than any key."""
    sizes = row.bincount(minlength=count)
    place = torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]
    result = torch.full((count, int(sizes.max())), torch.iinfo(torch.int64).max, device=row.device)
    result[row, place] = keys
    return result


def farthest_by_rows(feats: Tensor, block: int) -> Tensor:
    """(N,) float32 largest squared distance of each image, of float32 products."""
    centred = feats - feats.mean(0)
    norms = centred.square().sum(1)
    far = torch.zeros(len(feats), device=feats.device)
    for row0 in range(0, len(feats), block):
        rows = slice(row0, row0 + block)
        for col0 in range(0, len(feats), 8 * block):
            columns = slice(col0, col0 + 8 * block)
            sq = torch.addmm(norms[columns], centred[rows], centred[columns].T, alpha=-2).amax(1).add_(norms[rows])
            far[rows] = torch.maximum(far[rows], sq)
    return far


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """Products of float16 are added up in float32, whatever the user has allowed."""
    place = torch.backends.cuda.matmul
    if not hasattr(place, "allow_fp16_accumulation"):  # torch before 2.7
        yield
        return
    kept = place.allow_fp16_accumulation
    place.allow_fp16_accumulation = False
    try:
        yield
    finally:
        place.allow_fp16_accumulation = kept


def mean_of(feats: Tensor) -> Tensor:
    """(D,) float64."""
    return feats.sum(0, dtype=torch.float64) / len(feats)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of


@cache
def triton_works() -> bool:
    """Whether this machine compiles loops for its GPU, which needs Triton and a C compiler; asked once in a process."""
    try:
        from fastreid_uns.pseudo_labels.search.triton_kernels import pair_distances as fused

        rows = torch.arange(6.0, device="cuda").view(2, 3)
        place = torch.tensor([0, 1], device="cuda")
        return fused(rows, place, place.flip(0)).tolist() == [27.0, 27.0]
    except Exception as error:  # of many kinds, from the import to the compiler
        logger.info("neighbours: no Triton (%s); distances are measured by operations of torch, which is slower", error)
        return False


def pair_distances(feats: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(P,) float32 squared distances of pairs of rows, summed in float64, where no loop compiled by numba reaches."""
    if feats.is_cuda and triton_works():
        from fastreid_uns.pseudo_labels.search.triton_kernels import pair_distances as fused

        return fused(feats, first, second)
    chunk = max(1, 2**24 // feats.shape[1])
    parts = [torch.empty(0, device=feats.device)]
    for a, b in zip(first.split(chunk), second.split(chunk), strict=True):
        parts.append((feats[a].double() - feats[b].double()).square_().sum(1).float())
    return torch.cat(parts)
