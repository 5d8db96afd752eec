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

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


@torch.no_grad()
def nearest_neighbours(feats: Tensor, k: int, *, block: int = 2048) -> tuple[Tensor, Tensor]:
    """The k nearest images of each image by squared Euclidean distance, exactly, the image itself first.

    Args:
        feats: (N, D) float, finite; computed in float32 on the device that it is on.
        k: neighbours of each image, itself included, 1..N.
        block: rows and columns of the block of products that is held at a time. Distances may differ by rounding
            (about 1e-6) between block sizes, and so may the order of neighbours that are this close to a tie.

    Returns:
        Squared distances (N, k) float32, ascending from the image's own 0, and their images (N, k) int64; where
        distances are equal, the lower index comes first.

    Raises:
        ValueError: NaN or infinite rows, no rows, or k outside 1..N.
    """
    sq, index, _ = neighbours_and_farthest(feats, k, block=block)
    return sq, index


@torch.no_grad()
def neighbours_and_farthest(feats: Tensor, k: int, *, block: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    """`nearest_neighbours`, and (N,) float32 squared distance of each image to the one farthest from it."""
    if not 1 <= k <= len(feats):
        raise ValueError(f"nearest_neighbours: k is {k}; it must lie in 1..{len(feats):,}, the number of images.")
    check_finite(feats)
    norms = torch.cat([rows.float().square().sum(1) for rows in feats.split(block)])
    search = _search_each_pair_once if feats.device.type == "cpu" else _search_by_rows
    with full_precision(feats.device):
        return search(feats, norms, k, block)


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


def reciprocal_encoding(feats: Tensor, k1: int = 30, k2: int = 6) -> csr_matrix:
    """Neighbourhood of each image as weights over images: (N, N) CSR int32 in units of 2^-30, rows sum to 1.

    Arguments and errors are those of `jaccard_distance`.
    """
    if k1 < 2 or k2 < 1:
        raise ValueError(f"jaccard distance: k1 is {k1} and k2 is {k2}; k1 must be at least 2 and k2 at least 1.")
    k = min(k1, len(feats))
    if k < k1:
        warnings.warn(f"k1 {k1} exceeds the {k} images there are; {k} neighbours are used. Lower K1.", stacklevel=2)
    sq, index = nearest_neighbours(feats, k)
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
        (N, N) CSR int32 in units of 2^-30, rows sum to 1; columns of a row are in no order.
    """
    from scipy.sparse import csr_matrix

    from fastreid_uns.pseudo_labels import kernels
    from fastreid_uns.utils.compiled import Workers

    n, k = index.shape
    near, near_sq = index.to("cpu", torch.int32).numpy(), sq.cpu().numpy()
    back = np.empty_like(near)
    half = min(round(k1 / 2) + 1, k)
    with Workers() as workers:
        workers.over_rows(kernels.place_in_return, n, near, back)
        sizes, members, distances = _join(workers.over_rows(kernels.expanded_sets, n, near, near_sq, back, half))
        starts = _starts(sizes)
        rows = np.repeat(np.arange(n), sizes)
        unlisted = np.flatnonzero(distances < 0)
        pairs = rows[unlisted], members[unlisted]
        if feats.device.type == "cpu":
            array, missing = feats.detach().float().contiguous().numpy(), np.empty(len(unlisted), np.float32)
            workers.over_rows(kernels.pair_distances, len(missing), array, *pairs, missing)
            distances[unlisted] = missing
        else:
            distances[unlisted] = _pair_distances(feats, *pairs)
        weights = np.exp(-exponent(rows, distances.astype(np.float64)))
        weights /= np.repeat(np.add.reduceat(weights, starts[:-1]), sizes)
        if k2 > 1:
            averages = workers.over_rows(kernels.averaged_rows, n, near, min(k2, k), starts, members, weights)
            sizes, members, weights = _join(averages)
            starts = _starts(sizes)
        else:
            weights = np.rint(weights * kernels.UNIT).astype(np.int32)
    encoding = csr_matrix((weights, members, starts), shape=(n, n))
    encoding.eliminate_zeros()
    return encoding


def encoding_distance(rows: csr_matrix, columns: csr_matrix | None = None, *, max_distance: float = 1.0) -> csr_matrix:
    """Jaccard distance of encodings: 1 - mu / (2 - mu), mu the sum of the smaller of two weights.

    Args:
        rows: (M, T) encodings, weights in units of 2^-30, none of them zero.
        columns: (T, N) the encodings to compare with, transposed; without it, `rows` among themselves.
        max_distance: pairs farther apart are left out.

    Returns:
        (M, N) CSR float32 in [0, 1), as in `jaccard_distance`.
    """
    from scipy.sparse import coo_matrix, csr_matrix

    from fastreid_uns.pseudo_labels import kernels
    from fastreid_uns.utils.compiled import over_rows

    symmetric = columns is None
    lists = rows.T.tocsr() if columns is None else columns
    n = lists.shape[1]
    first, last = lists.indptr[rows.indices], lists.indptr[rows.indices + 1]
    if symmetric:  # each pair once: an entry meets those that stand behind it in its column
        slots = csr_matrix((np.arange(rows.nnz), rows.indices, rows.indptr), shape=rows.shape).tocsc().data
        first = np.empty(rows.nnz, lists.indptr.dtype)
        first[slots] = np.arange(rows.nnz)
    entries = (rows.indptr, rows.indices, rows.data, first, last, lists.indices, lists.data)
    limit = np.float32(max_distance)
    parts = over_rows(kernels.overlap_distances, rows.shape[0], *entries, n, limit, slabs=32)
    sizes, found, distances = _join(parts)
    result = csr_matrix((distances, found, _starts(sizes)), shape=(rows.shape[0], n))
    if symmetric:
        upper = result.tocoo()
        off = upper.row != upper.col
        pairs = [np.concatenate([a, b[off]]) for a, b in ((upper.row, upper.col), (upper.col, upper.row))]
        result = coo_matrix((np.concatenate([upper.data, upper.data[off]]), tuple(pairs)), shape=result.shape).tocsr()
    result.sort_indices()
    return result


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
    """Refuse NaN and infinity.

    Raises:
        ValueError: names how many rows are broken, and the first of them.
    """
    broken = torch.cat([~rows.isfinite().all(1) for rows in feats.split(8192)]).nonzero().flatten()
    if len(broken):
        raise ValueError(
            f"features: {len(broken):,} of {len(feats):,} rows hold NaN or infinity, the first is row "
            f"{int(broken[0]):,}; all must be finite. Look for a diverged loss or a broken image."
        )


def _search_each_pair_once(feats: Tensor, norms: Tensor, k: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Upper triangle of blocks; each serves its rows and its columns, so a row sees the others in ascending order."""
    from fastreid_uns.pseudo_labels import kernels
    from fastreid_uns.utils.compiled import Workers

    n = len(feats)
    sq = np.full((n, k), np.inf, np.float32)
    index = np.zeros((n, k), np.int32)
    sq[:, 0], index[:, 0] = -1, np.arange(n)  # nothing comes before the image itself, not even its double
    farthest = np.zeros(n, np.float32)
    held = torch.empty(min(block, n) ** 2)
    with Workers() as workers:
        for row0 in range(0, n, block):
            above = feats[row0 : row0 + block].float()
            for col0 in range(row0, n, block):
                beside = feats[col0 : col0 + block].float()
                products = held[: len(above) * len(beside)].view(len(above), len(beside))
                torch.mm(above, beside.T, out=products)
                args = (products.numpy(), norms.numpy(), row0, col0, sq, index, farthest)
                workers.over_rows(kernels.offer_columns, len(above), *args, slabs=1)
                if col0 > row0:
                    workers.over_rows(kernels.offer_rows, len(beside), *args, slabs=1)
    sq[:, 0] = 0
    return torch.from_numpy(sq), torch.from_numpy(index).long(), torch.from_numpy(farthest)


def _search_by_rows(feats: Tensor, norms: Tensor, k: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """All blocks, ranked by one integer per pair: bits of the distance above, index below, so there are no ties."""
    found, farthest = [], []
    ids = torch.arange(len(feats), device=feats.device)
    for above, rows, row_norms in zip(feats.split(block), ids.split(block), norms.split(block), strict=True):
        best = torch.empty((len(rows), 0), dtype=torch.int64, device=feats.device)
        far = torch.zeros_like(row_norms)
        for beside, columns in zip(feats.split(8 * block), ids.split(8 * block), strict=True):
            products = above.float() @ beside.float().T
            sq = (row_norms[:, None] + norms[columns]).sub_(products, alpha=2).clamp_(min=0)
            far = torch.maximum(far, sq.amax(1))
            keys = (sq.view(torch.int32).long() << 32) | columns
            here = rows[(rows >= columns[0]) & (rows <= columns[-1])]
            # Nothing comes before the image itself, not even its double.
            keys[here - rows[0], here - columns[0]] = here | -(2**63)
            best = torch.cat([best, keys], 1)
            best = best.topk(min(k, best.shape[1]), dim=1, largest=False).values
        found.append(best)
        farthest.append(far)
    keys = torch.cat(found)
    return ((keys >> 32) & 0x7FFFFFFF).int().view(torch.float32), keys & 0xFFFFFFFF, torch.cat(farthest)


def _pair_distances(feats: Tensor, first: np.ndarray, second: np.ndarray, chunk: int = 8192) -> np.ndarray:
    """(P,) squared distances of pairs of rows, where no compiled loop reaches."""
    parts = [np.empty(0, np.float32)]
    for at in range(0, len(first), chunk):
        a, b = (torch.from_numpy(side[at : at + chunk]).to(feats.device).long() for side in (first, second))
        parts.append((feats[a].float() - feats[b].float()).square().sum(1).cpu().numpy())
    return np.concatenate(parts)


def _join(parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])
