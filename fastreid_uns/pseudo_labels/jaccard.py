"""The k-reciprocal Jaccard distance as a sparse matrix.

Four functions make it, and other forms of it can recombine them: `reciprocal_sets`, `set_weights`, `average_rows` and
`encoding_distance`. No step holds an N x N matrix, only O(N * k) numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.search.exact import check_finite, nearest_neighbours, nearest_of_others
from fastreid_uns.pseudo_labels.search.gpu import pair_distances
from fastreid_uns.utils import sharing

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

_NEAR = 0.9  # distance up to which most rows that share a column need not be compared


class ReciprocalSets(NamedTuple):
    """The expanded k-reciprocal set of each image, with images renumbered so that similar ones are near in memory.

    Image `order[p]` has place p, and the places of its set are `members[starts[p]:starts[p + 1]]`.
    """

    order: np.ndarray  # (N,) int32 image at each place
    place: np.ndarray  # (N,) int32 place of each image
    near: np.ndarray  # (N, k) int32 places of the nearest neighbours, the image itself first
    starts: np.ndarray  # (N + 1,) int64
    members: np.ndarray  # int32 places


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


def camera_jaccard_distance(
    feats: Tensor,
    cameras: Tensor,
    *,
    k1_intra: int = 5,
    k1_inter: int = 20,
    k2_intra: int = 2,
    k2_inter: int = 4,
    max_distance: float = 1.0,
) -> csr_matrix:
    """Jaccard distance whose neighbours are searched in the own camera and in all other cameras apart.

    Args:
        feats: (N, D) float, unit length.
        cameras: (N,) int; -1 is a camera of its own.
        k1_intra, k1_inter: `k1_intra` + 1 images of the own camera vote, the image itself included, and `k1_inter` + 1
            of the others; all of them where there are fewer. 0 for `k1_intra` is for data in which no camera sees an
            identity twice.
        k2_intra, k2_inter: neighbours of each list over which the encoding is averaged; the image itself is one of the
            first.
        max_distance: pairs farther apart are left out.

    Returns:
        (N, N) symmetric CSR float32 in [0, 1), as `jaccard_distance` gives it.

    Raises:
        ValueError: NaN or infinite rows, a number out of range, one camera only, or cameras of some images only.

    Source: Chen et al. 2024 (CA-Jaccard), official code; differs: lists of a small camera are not filled with images of
    the other kind, the averages then run over the rows that exist; distances are rounded to 2^-20.
    Memory: O(N * (k1_intra + k1_inter)) beside the result. Time: one k-NN search.
    """
    encoding = camera_encoding(feats, cameras, k1_intra, k1_inter, k2_intra, k2_inter)
    return encoding_distance(encoding, max_distance=max_distance)


def camera_encoding(
    feats: Tensor,
    cameras: Tensor,
    k1_intra: int,
    k1_inter: int,
    k2_intra: int,
    k2_inter: int,
    scale: np.ndarray | None = None,
) -> csr_matrix:
    """Neighbourhoods of `camera_jaccard_distance` as weights over images, in the form of `reciprocal_encoding`.

    Args:
        scale: see `mutual_weights`.
    """
    if min(k1_inter, k2_intra) < 1 or min(k1_intra, k2_inter) < 0:
        raise InvalidValue(
            f"camera-aware distance: k1_intra {k1_intra}, k1_inter {k1_inter}, k2_intra {k2_intra} and k2_inter "
            f"{k2_inter}; 1 or more are accepted, 0 for k1_intra and k2_inter. Raise them."
        )
    own, others = camera_lists(feats, cameras, max(k1_intra + 1, k2_intra), max(k1_inter + 1, k2_inter))
    weights = mutual_weights([own.first(k1_intra + 1), others.first(k1_inter + 1)], scale)
    return average_listed(weights, [own.first(k2_intra), others.first(k2_inter)])


class Neighbours(NamedTuple):
    """Lists of the nearest of some images, in order of their distance; inf and -1 where a list is shorter."""

    sq: np.ndarray  # (N, k) float32 squared distances
    images: np.ndarray  # (N, k) int64

    def first(self, k: int) -> Neighbours:
        """The first k of each list."""
        return Neighbours(self.sq[:, :k], self.images[:, :k])


def camera_lists(feats: Tensor, cameras: Tensor, k_intra: int, k_inter: int) -> tuple[Neighbours, Neighbours]:
    """The nearest images of the own camera, the image itself first, and the nearest of all other cameras.

    Args:
        feats: (N, D) float, unit length.
        cameras: (N,) int; -1 is a camera of its own.
        k_intra, k_inter: images of a list; a list is shorter where there are fewer.

    Raises:
        ValueError: NaN or infinite rows, one camera only, or another number of cameras than of images.
    """
    _check_cameras(feats, cameras)
    others = nearest_of_others(feats, cameras, min(k_inter, len(feats)))
    return _of_own_camera(feats, cameras, k_intra), Neighbours(*(values.cpu().numpy() for values in others))


def _check_cameras(feats: Tensor, cameras: Tensor) -> None:
    check_finite(feats)
    if len(cameras) != len(feats):
        raise InvalidValue(
            f"camera-aware distance: {len(cameras):,} cameras for {len(feats):,} images; each needs one. Pass them "
            f"all, -1 for unknown ones."
        )
    unknown, count = int((cameras < 0).sum()), len(cameras.unique())
    if count < 2:
        raise InvalidValue(
            f"camera-aware distance: all {len(cameras):,} images are of "
            f"{'an unknown camera' if unknown else f'camera {int(cameras[0])}'}; two or more cameras are needed. Set "
            f"PSEUDO_LABELS.DISTANCE to jaccard, or use a set with camera labels."
        )
    if unknown:
        warnings.warn(f"{unknown:,} images of unknown cameras count as those of one camera.", stacklevel=4)


def _of_own_camera(feats: Tensor, cameras: Tensor, k: int) -> Neighbours:
    sq, index = torch.full((len(feats), k), torch.inf), torch.full((len(feats), k), -1)
    for camera in cameras.unique():
        own = (cameras == camera).nonzero().flatten().cpu()
        count = min(k, len(own))
        near_sq, near = nearest_neighbours(feats[own.to(feats.device)], count)
        sq[own, :count], index[own, :count] = near_sq.cpu(), own[near.cpu()]
    return Neighbours(sq.numpy(), index.numpy())


def mutual_weights(lists: Sequence[Neighbours], scale: np.ndarray | None = None) -> csr_matrix:
    """Softmax of the negative distances over those neighbours that are in each other's list of the same kind.

    Args:
        lists: of images that no other list holds; each image is in one of its own.
        scale: (N,) squared distance by which those of an image are divided before they are squared again, as
            re-ranking has it; None takes them as they are.

    Returns:
        (N, N) CSR float64, rows sum to 1.

    Source: Chen et al. 2024 (CA-Jaccard), official code: sets without the expansion of `reciprocal_sets`.
    """
    from scipy.sparse import diags

    parts = []
    for sq, index in lists:
        distances = sq if scale is None else (sq / scale[:, None]) ** 2
        weights = _listed(np.exp(-distances), index)
        held = weights.copy()
        held.data[:] = 1
        parts.append(weights.multiply(held.T))
    total = sum(parts[1:], parts[0]).tocsr()
    return (diags(1 / np.asarray(total.sum(1)).ravel()) @ total).tocsr()


def average_listed(weights: csr_matrix, lists: Sequence[Neighbours]) -> csr_matrix:
    """The weights of each image averaged over all images of its lists.

    Args:
        weights: (N, N) CSR float64, rows sum to 1.
        lists: of images that no other list holds; an image without any is not accepted.

    Returns:
        (N, N) CSR int32 as `reciprocal_encoding` gives it.

    Source: Chen et al. 2024 (CA-Jaccard), official code; differs: short lists are not filled.
    """
    near = np.concatenate([index for _, index in lists], axis=1).astype(np.int32)
    images = np.arange(len(near), dtype=np.int32)
    members = weights.indices.astype(np.int32, copy=False)
    return _averaged(images, images, near, near.shape[1], weights.indptr.astype(np.int64), members, weights.data)


def _averaged(order: np.ndarray, *lists: np.ndarray | int) -> csr_matrix:
    """(N, N) CSR of what `jaccard_kernels.averaged_rows` gives for all rows."""
    from scipy.sparse import csr_matrix

    from fastreid_uns.pseudo_labels import jaccard_kernels
    from fastreid_uns.utils.compiled import Workers

    n = len(order)
    with Workers() as workers:
        rows = workers.over_rows(jaccard_kernels.averaged_rows, n, order, *lists)  # quicker than to send them
        sizes, columns, values = workers.joined(rows)
    return csr_matrix((values, columns, _starts(sizes)), shape=(n, n))


def _listed(values: np.ndarray, index: np.ndarray) -> csr_matrix:
    """(N, N) CSR float64 of the values of each image's list; entries of image -1 are left out."""
    from scipy.sparse import csr_matrix

    kept = index >= 0
    starts = _starts(kept.sum(1))
    return csr_matrix((values[kept].astype(np.float64), index[kept], starts), shape=(len(index), len(index)))


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
        k1: see `reciprocal_sets`.
        k2: rows of so many nearest are averaged.
        exponent: see `set_weights`.

    Returns:
        (N, N) CSR int32 in units of 2^-30, rows sum to 1; the largest entries of a row come first.
    """
    sets, distances = reciprocal_sets(feats, sq, index, k1)
    weights = set_weights(sets, distances, exponent)
    del distances
    return average_rows(sets, weights, k2)


def reciprocal_sets(feats: Tensor, sq: Tensor, index: Tensor, k1: int) -> tuple[ReciprocalSets, np.ndarray]:
    """The expanded k-reciprocal sets, and the squared distance (float32) of each member to the image of its set.

    Args:
        feats: (N, D).
        sq, index: (N, k) what `nearest_neighbours` gave for `feats`; all columns vote.
        k1: expansion looks at the sets of the round(k1 / 2) + 1 nearest, half rounded to even.

    Source: Zhong et al. 2017, eq. 4 and 5.
    """
    from fastreid_uns.pseudo_labels import jaccard_kernels
    from fastreid_uns.utils.compiled import Workers

    n, k = index.shape
    near = index.to("cpu", torch.int32).numpy()
    order = _alike_together(np.arange(0, n * k, k), near.ravel(), square=True)
    place = np.empty_like(order)
    place[order] = np.arange(n)
    near, near_sq = place[near[order]], sq.cpu().numpy()[order]
    back = np.empty_like(near)
    half = min(round(k1 / 2) + 1, k)
    with Workers() as workers:
        workers.over_rows(jaccard_kernels.place_in_return, n, near, back)
        parts = workers.over_shared_rows(jaccard_kernels.expanded_sets, n, near, near_sq, back, half)
        del near_sq, back
        sizes, members, distances = workers.joined(parts)
        starts = _starts(sizes)
        unlisted = np.flatnonzero(distances < 0)
        counts = np.add.reduceat(distances < 0, starts[:-1], dtype=np.int64)
        pairs = np.repeat(order, counts), order[members[unlisted]]
        if feats.device.type == "cpu":
            array, missing = feats.detach().float().contiguous().numpy(), np.empty(len(unlisted), np.float32)
            own = sharing.own_rows(len(missing))
            part = tuple(side[own.start : own.stop] for side in pairs)
            workers.over_rows(jaccard_kernels.pair_distances, len(own), array, *part, missing[own.start : own.stop])
            distances[unlisted] = np.concatenate(sharing.from_all(missing[own.start : own.stop]))
        else:
            first, second = (torch.from_numpy(side).to(feats.device) for side in pairs)
            distances[unlisted] = pair_distances(feats.float(), first, second).cpu().numpy()
    return ReciprocalSets(order, place, near, starts, members), distances


def set_weights(
    sets: ReciprocalSets, distances: np.ndarray, exponent: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """exp(-x) of each member over the sum in its set, float64.

    Args:
        distances: squared distance of each member, as `reciprocal_sets` gives it.
        exponent: gives x from the images and the squared distances of some members.

    Source: Zhong et al. 2017, eq. 7.
    """
    result = np.empty(len(distances))
    for row0 in range(0, len(sets.order), 65536):  # some rows at a time, for the sake of memory
        cuts = sets.starts[row0 : row0 + 65537]
        part = slice(cuts[0], cuts[-1])
        sizes = np.diff(cuts)
        rows = np.repeat(sets.order[row0 : row0 + len(sizes)], sizes)
        weights = np.exp(-exponent(rows, distances[part].astype(np.float64)))
        result[part] = weights / np.repeat(np.add.reduceat(weights, cuts[:-1] - cuts[0]), sizes)
    return result


def average_rows(sets: ReciprocalSets, weights: np.ndarray, k2: int) -> csr_matrix:
    """The weights of each image averaged over its k2 nearest, itself included.

    Args:
        weights: of the members of `sets`, float64; those of a set sum to 1.
        k2: rows that are averaged; 1 averages nothing.

    Returns:
        (N, N) CSR int32 in units of 2^-30, images in their own numbers, rows sum to 1; the largest entries of a row
        come first.

    Source: Zhong et al. 2017, eq. 11 (local query expansion).
    """
    k2 = min(k2, sets.near.shape[1])
    return _averaged(sets.order, sets.place, sets.near, k2, sets.starts, sets.members, weights)


def encoding_distance(rows: csr_matrix, columns: csr_matrix | None = None, *, max_distance: float = 1.0) -> csr_matrix:
    """Jaccard distance of encodings: 1 - mu / (2 - mu), mu the sum of the smaller of two weights.

    Args:
        rows: (M, T) encodings, weights in units of 2^-30, none of them zero, no row empty.
        columns: (T, N) the encodings to compare with, transposed; without it, `rows` among themselves.
        max_distance: pairs farther apart are left out.

    Returns:
        (M, N) CSR float32 in [0, 1), as in `jaccard_distance`. Of the processes that share loops, only the first gets
        the distances of rows among themselves, for `dbscan`; the others get an empty matrix.
    """
    from scipy.sparse import csr_matrix

    from fastreid_uns.pseudo_labels import jaccard_kernels
    from fastreid_uns.utils.compiled import Workers

    if columns is None and max_distance <= _NEAR:
        return _near_distance(rows, max_distance)
    columns = rows.T.tocsr() if columns is None else columns
    entries, lists = ((a.indptr, a.indices, a.data) for a in (rows, columns))
    shape = rows.shape[0], columns.shape[1]
    args = (*entries, *lists, shape[1], np.float32(max_distance))
    with Workers() as workers:
        parts = workers.over_rows(jaccard_kernels.overlap_distances, shape[0], *args, slabs=32)
        sizes, found, distances = workers.joined(parts)
    result = csr_matrix((distances, found, _starts(sizes)), shape=shape)
    result.sort_indices()
    return result


def _near_distance(rows: csr_matrix, max_distance: float) -> csr_matrix:
    """`encoding_distance` of rows among themselves, where so few are near that most need not be compared."""
    from scipy.sparse import coo_matrix, csr_matrix

    from fastreid_uns.pseudo_labels import jaccard_kernels
    from fastreid_uns.utils.compiled import Workers

    n, width = rows.shape
    order = _alike_together(rows.indptr[:-1], rows.indices, square=n == width)
    entries = (order, rows.indptr, rows.indices, rows.data)
    begin = _starts(np.sum([np.bincount(part, minlength=width) for part in np.array_split(rows.indices, 16)], axis=0))
    bits = 31 - n.bit_length()  # what an int32 has left beside a place
    lists = np.empty(rows.nnz, np.int32)
    with Workers() as workers:
        workers.over_rows(jaccard_kernels.lists_of_columns, width, begin, *entries, bits, lists, slabs=1)
        limit = np.float32(max_distance)
        args = (*entries, begin, lists, bits, limit)
        near = workers.over_shared_rows(jaccard_kernels.near_rows, n, *args, slabs=32, first_only=True)
        if not sharing.first():
            return csr_matrix((n, n), dtype=np.float32)
        sizes, found, distances = workers.joined(near)
    del lists, args
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


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])
