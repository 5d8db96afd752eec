"""Nearest neighbours in blocks, and the k-reciprocal Jaccard distance as a sparse matrix.

No step holds an N x N matrix: the search holds one block of products, everything after it O(N * k) numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.candidates import search_by_candidates

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_NEAR = 0.9  # distance up to which most rows that share a column need not be compared
_SPARE = 8  # candidates beside the k nearest, where they are not told by a bound


@torch.no_grad()
def nearest_neighbours(feats: Tensor, k: int, *, block: int = 2048) -> tuple[Tensor, Tensor]:
    """The k nearest images of each image by squared Euclidean distance, exactly, the image itself first.

    On a GPU an image may be missed where float32 products cannot tell more than 8 further ones from the k-th nearest:
    several tight clumps far from each other, as a collapsed network gives.

    Args:
        feats: (N, D) float, finite; taken as float32 on the device that it is on.
        k: neighbours of each image, itself included, 1..N.
        block: rows and columns of a block of products at most; it does not show in the result.

    Returns:
        Squared distances (N, k) float32, ascending from the image's own 0, and their images (N, k) int64; where
        distances are equal, the lower index comes first. A distance is summed in float64 and rounded once.

    Raises:
        ValueError: NaN or infinite rows, no rows, or k outside 1..N.
    """
    return _search(feats, k, block)[:2]


@torch.no_grad()
def neighbours_and_farthest(feats: Tensor, k: int, *, block: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    """`nearest_neighbours`, and (N,) float32 squared distance of each image to the one farthest from it.

    The farthest is that of a float32 product, which may be off by rounding (about 1e-6).
    """
    return _search(feats, k, block, farthest=True)


def _search(feats: Tensor, k: int, block: int, *, farthest: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    feats = checked(feats, k)
    with full_precision(feats.device):
        if feats.device.type == "cpu":
            return search_by_candidates(feats, k, block, farthest=farthest)
        return _search_by_rows(feats, k, block)


def checked(feats: Tensor, k: int) -> Tensor:
    """The features as float32 in one piece, if they can be searched.

    Raises:
        ValueError: as `nearest_neighbours`.
    """
    if not 1 <= k <= len(feats):
        raise InvalidValue(f"nearest_neighbours: k is {k}; it must lie in 1..{len(feats):,}, the number of images.")
    check_finite(feats)
    return feats.detach().float().contiguous()


def jaccard_distance(feats: Tensor, k1: int = 30, k2: int = 6, *, max_distance: float = 1.0) -> csr_matrix:
    """Distance by overlap of k-reciprocal neighbourhoods, as a sparse matrix.

    Args:
        feats: (N, D) float, unit length.
        k1: neighbours that vote, the image itself included (>= 2); taken as N if there are fewer images.
        k2: neighbours over which the encoding is averaged, the image itself included; 1 switches it off.
        max_distance: pairs farther apart are left out, row by row, so they never take memory.

    Returns:
        (N, N) symmetric CSR float32 in [0, 1), sorted, with its diagonal of zeros; absent pairs have distance 1, or
        at least more than `max_distance`. Values are multiples of 2^-20.

    Raises:
        ValueError: NaN or infinite rows, or k1 or k2 out of range.

    Source: Zhong et al. 2017, eq. 8-10, as the clustering papers use it; differs: no final blend with the original
    distance, k1 columns instead of k1 + 1, and distances rounded to 2^-20, so that structural ties (exactly 0.5 when
    4 of k2 = 6 neighbours agree) do not fall on either side of a radius by the last bit of a sum.
    Memory: O(N * k1) beside the result. Time: one k-NN search plus O(N * k1^2).
    """
    return encoding_distance(reciprocal_encoding(feats, k1, k2), max_distance=max_distance)


def reciprocal_encoding(
    feats: Tensor, k1: int = 30, k2: int = 6, search: Callable[[Tensor, int], tuple[Tensor, Tensor]] | None = None
) -> csr_matrix:
    """Neighbourhood of each image as weights over images: (N, N) CSR int32 in units of 2^-30, rows sum to 1.

    Arguments and errors are those of `jaccard_distance`; `search` finds neighbours as `nearest_neighbours` does, which
    it is by default.
    """
    if k1 < 2 or k2 < 1:
        raise InvalidValue(f"jaccard distance: k1 is {k1} and k2 is {k2}; k1 must be at least 2 and k2 at least 1.")
    k = min(k1, len(feats))
    if k < k1:
        warnings.warn(f"k1 {k1} exceeds the {k} images there are; {k} neighbours are used. Lower K1.", stacklevel=2)
    sq, index = (search or nearest_neighbours)(feats, k)
    return encode(feats, sq, index, k1, k2, lambda rows, distances: distances)


def encode(
    feats: Tensor, sq: Tensor, index: Tensor, k1: int, k2: int, exponent: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> csr_matrix:
    """Weights of the expanded k-reciprocal sets, averaged over the k2 nearest.

    Args:
        feats: (N, D).
        sq, index: what `nearest_neighbours` gave for `feats`; all its columns vote.
        k1: expansion looks at the sets of the round(k1 / 2) + 1 nearest, half rounded to even.
        k2: rows of so many nearest are averaged.
        exponent: gives x, from the row and the squared distance of each pair, for its weight exp(-x).

    Returns:
        (N, N) CSR int32 in units of 2^-30, rows sum to 1; the largest entries of a row come first.
    """
    from scipy.sparse import csr_matrix

    from fastreid_uns.pseudo_labels import kernels
    from fastreid_uns.utils.compiled import Workers

    n, k = index.shape
    near = index.to("cpu", torch.int32).numpy()
    order = _alike_together(np.arange(0, n * k, k), near.ravel(), square=True)
    place = np.empty_like(order)
    place[order] = np.arange(n)
    near, near_sq = place[near[order]], sq.cpu().numpy()[order]  # from here on, images are numbered by their place
    back = np.empty_like(near)
    half = min(round(k1 / 2) + 1, k)
    with Workers() as workers:
        workers.over_rows(kernels.place_in_return, n, near, back)
        sets = workers.over_rows(kernels.expanded_sets, n, near, near_sq, back, half)
        del near_sq, back
        sizes, members, distances = workers.joined(sets)
        starts = _starts(sizes)
        unlisted = np.flatnonzero(distances < 0)
        counts = np.add.reduceat(distances < 0, starts[:-1], dtype=np.int64)
        pairs = np.repeat(order, counts), order[members[unlisted]]
        if feats.device.type == "cpu":
            array, missing = feats.detach().float().contiguous().numpy(), np.empty(len(unlisted), np.float32)
            workers.over_rows(kernels.pair_distances, len(missing), array, *pairs, missing)
            distances[unlisted] = missing
        else:
            first, second = (torch.from_numpy(side).to(feats.device) for side in pairs)
            distances[unlisted] = _pair_distances(feats.float(), first, second).cpu().numpy()
        weights = _weights(distances, starts, order, exponent)
        del distances, unlisted, pairs
        lists = (near, min(k2, k), starts, members, weights)
        sizes, members, weights = workers.joined(workers.over_rows(kernels.averaged_rows, n, order, place, *lists))
    return csr_matrix((weights, members, _starts(sizes)), shape=(n, n))


def _weights(
    distances: np.ndarray,
    starts: np.ndarray,
    images: np.ndarray,
    exponent: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    """exp(-x) of each entry over its sum in the row, float64; some rows at a time, for the sake of memory."""
    result = np.empty(len(distances))
    for row0 in range(0, len(starts) - 1, 65536):
        cuts = starts[row0 : row0 + 65537]
        part = slice(cuts[0], cuts[-1])
        sizes = np.diff(cuts)
        rows = np.repeat(images[row0 : row0 + len(sizes)], sizes)
        weights = np.exp(-exponent(rows, distances[part].astype(np.float64)))
        result[part] = weights / np.repeat(np.add.reduceat(weights, cuts[:-1] - cuts[0]), sizes)
    return result


def encoding_distance(rows: csr_matrix, columns: csr_matrix | None = None, *, max_distance: float = 1.0) -> csr_matrix:
    """Jaccard distance of encodings: 1 - mu / (2 - mu), mu the sum of the smaller of two weights.

    Args:
        rows: (M, T) encodings, weights in units of 2^-30, none of them zero, no row empty.
        columns: (T, N) the encodings to compare with, transposed; without it, `rows` among themselves.
        max_distance: pairs farther apart are left out.

    Returns:
        (M, N) CSR float32 in [0, 1), as in `jaccard_distance`.
    """
    from scipy.sparse import csr_matrix

    from fastreid_uns.pseudo_labels import kernels
    from fastreid_uns.utils.compiled import Workers

    if columns is None and max_distance <= _NEAR:
        return _near_distance(rows, max_distance)
    columns = rows.T.tocsr() if columns is None else columns
    entries, lists = ((a.indptr, a.indices, a.data) for a in (rows, columns))
    shape = rows.shape[0], columns.shape[1]
    args = (*entries, *lists, shape[1], np.float32(max_distance))
    with Workers() as workers:
        parts = workers.over_rows(kernels.overlap_distances, shape[0], *args, slabs=32)
        sizes, found, distances = workers.joined(parts)
    result = csr_matrix((distances, found, _starts(sizes)), shape=shape)
    result.sort_indices()
    return result


def _near_distance(rows: csr_matrix, max_distance: float) -> csr_matrix:
    """`encoding_distance` of rows among themselves, where so few are near that most need not be compared."""
    from scipy.sparse import coo_matrix, csr_matrix

    from fastreid_uns.pseudo_labels import kernels
    from fastreid_uns.utils.compiled import Workers

    n, width = rows.shape
    order = _alike_together(rows.indptr[:-1], rows.indices, square=n == width)
    entries = (order, rows.indptr, rows.indices, rows.data)
    begin = _starts(np.sum([np.bincount(part, minlength=width) for part in np.array_split(rows.indices, 16)], axis=0))
    bits = 31 - n.bit_length()  # what an int32 has left beside a place
    lists = np.empty(rows.nnz, np.int32)
    with Workers() as workers:
        workers.over_rows(kernels.lists_of_columns, width, begin, *entries, bits, lists, slabs=1)
        limit = np.float32(max_distance)
        near = workers.over_rows(kernels.near_rows, n, *entries, begin, lists, bits, limit, slabs=32)
        sizes, found, distances = workers.joined(near)
    del lists
    half = csr_matrix((distances, found, _starts(sizes)), shape=(n, n)).tocoo()
    row, col = order[half.row], order[half.col]
    off = row != col
    pairs = tuple(np.concatenate([a, b[off]]) for a, b in ((row, col), (col, row)))
    result = coo_matrix((np.concatenate([half.data, half.data[off]]), pairs), shape=(n, n)).tocsr()
    result.sort_indices()
    return result


def _alike_together(starts: np.ndarray, columns: np.ndarray, *, square: bool) -> np.ndarray:
    """(N,) int32 order in which rows that share columns stand near each other, so that loops find them in the cache.

    Rows with many columns in common are likely to have the same lowest one. If the columns are those rows (`square`),
    the lowest that they have in turn is even more so.
    """
    lowest = np.minimum.reduceat(columns, starts)
    if square:
        lowest = np.minimum.reduceat(lowest[columns], starts)
    return np.argsort(lowest, kind="stable").astype(np.int32)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products in true float32, whatever training has chosen: rounding to TF32 would reorder neighbours."""
    places: tuple[Any, ...] = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    backends = [place for place in places if hasattr(place, "fp32_precision")]
    kept = [b.fp32_precision for b in backends] if backends else torch.get_float32_matmul_precision()
    _set_precision(backends, ["ieee"] * len(backends) if backends else "highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _set_precision(backends, kept)


def _set_precision(backends: list[Any], values: list[str] | str) -> None:
    if isinstance(values, str):  # torch before 2.9
        torch.set_float32_matmul_precision(values)
        return
    for backend, value in zip(backends, values, strict=True):
        backend.fp32_precision = value


def check_finite(feats: Tensor) -> None:
    """Refuse NaN and infinity, also of squared lengths in float32.

    Raises:
        ValueError: names how many rows are broken, and the first of them.
    """
    broken = torch.cat([~rows.float().square().sum(1).isfinite() for rows in feats.split(8192)]).nonzero().flatten()
    if len(broken):
        raise InvalidValue(
            f"features: {len(broken):,} of {len(feats):,} rows hold NaN or infinity, the first is row "
            f"{int(broken[0]):,}; all must be finite, and their squares too. Look for a diverged loss or a bad image."
        )


def _search_by_rows(feats: Tensor, k: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """The search where no compiled loop reaches: more than k by float32 products, the k nearest of them measured.

    All blocks; a pair is ranked by one integer, bits of the distance above and index below, so there are no ties. Of
    images that products cannot tell from the k-th nearest, `_SPARE` are measured, those of lower index first. Products
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
            if col0 <= row0 < col0 + 8 * block:  # the image itself needs no search
                sq[:, row0 - col0 : row0 - col0 + len(rows)].fill_diagonal_(torch.inf)
            best = _smallest(torch.cat([best, _keys_of_nearest(sq, columns, k + _SPARE)], 1), k + _SPARE)
        nearest.append(_measured(feats, rows, best & 0xFFFFFFFF, k))
        farthest.append(far)
    keys = torch.cat(nearest)
    return (keys >> 32).int().view(torch.float32), keys & 0xFFFFFFFF, torch.cat(farthest)


def _keys(sq: Tensor, index: Tensor) -> Tensor:
    """Integers in the order of distance, float32 and not negative, and then of index."""
    return (sq.view(torch.int32).long() << 32) | index


def _smallest(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[1]), dim=1, largest=False).values


def _keys_of_nearest(sq: Tensor, columns: Tensor, k: int, group: int = 16) -> Tensor:
    """Keys of the k nearest of each row, from those k groups of neighbouring columns that hold the nearest images."""
    width = sq.shape[1] // group * group
    tail = _keys(sq[:, width:], columns[width:])
    if not width:
        return tail
    grouped = sq[:, :width].unflatten(1, (-1, group))
    groups = torch.arange(grouped.shape[1], device=sq.device)
    chosen = _smallest(_keys(grouped.amin(2), groups), k) & 0xFFFFFFFF
    picked = grouped.gather(1, chosen[:, :, None].expand(-1, -1, group))
    return torch.cat([_keys(picked, columns[:width].unflatten(0, (-1, group))[chosen]).flatten(1), tail], 1)


def _measured(feats: Tensor, rows: Tensor, index: Tensor, k: int) -> Tensor:
    """Keys of the k nearest of some images, each itself first, out of their candidates (b, c), by true distances."""
    first = rows[:, None].expand_as(index)
    sq = _pair_distances(feats, first.flatten(), index.flatten()).view(index.shape)
    keys = _keys(sq.masked_fill(first == index, torch.inf), index)
    return torch.cat([rows[:, None], _smallest(keys, k - 1).sort(1).values], 1)


def _pair_distances(feats: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(P,) float32 squared distances of pairs of rows, summed in float64, where no compiled loop reaches."""
    chunk = max(1, 2**24 // feats.shape[1])
    parts = [torch.empty(0, device=feats.device)]
    for a, b in zip(first.split(chunk), second.split(chunk), strict=True):
        parts.append((feats[a].double() - feats[b].double()).square().sum(1).float())
    return torch.cat(parts)


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])
