"""Average linkage on a sparse distance, a distance that suits it, and the labels that both give."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator, centroids
from fastreid_uns.pseudo_labels.jaccard import encode, encoding_distance
from fastreid_uns.pseudo_labels.search.exact import nearest_neighbours
from fastreid_uns.registry import PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import FeatureBank, NoClusters, PairAnswers, PseudoLabels

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

PairSimilarity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (M,) images, (M,) images, their cosines → similarities

_REACH = 1.2  # neighbours that are compared by a similarity, with those that vote as 1
_UNIT = 2**20  # of similarities, which are integers: their sums are exact, so no order of images shows


class Dendrogram(NamedTuple):
    """Merges of clusters, the nearest first; those at distance 1 or never are left out.

    Node i < N is image i, node N + m is what merge m made.
    """

    count: int  # type: ignore[assignment]  # N
    children: np.ndarray  # (M,2) int64, the nodes that merge m joins
    heights: np.ndarray  # (M,) float64, ascending, the distance between them
    sizes: np.ndarray  # (M,) int64, images below

    def cut(self, threshold: float) -> np.ndarray:
        """(N,) int64 clusters that merges up to a distance of `threshold` make, numbered by their first image."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import connected_components

        made = int(np.searchsorted(self.heights, threshold, side="right"))
        nodes = self.count + made
        parents = np.repeat(np.arange(self.count, nodes), 2)
        below = self.children[:made].ravel()
        graph = coo_matrix((np.ones(2 * made, np.int8), (below, parents)), shape=(nodes, nodes))
        return in_order(connected_components(graph, directed=False)[1][: self.count])

    def members(self, node: int) -> np.ndarray:
        """Images below a node, ascending."""
        found, open_nodes = [], [node]
        while open_nodes:
            node = open_nodes.pop()
            if node < self.count:
                found.append(node)
            else:
                open_nodes += self.children[node - self.count].tolist()
        return np.sort(np.array(found, np.int64))


def in_order(labels: np.ndarray) -> np.ndarray:
    """(N,) int64 `labels` renumbered 0, 1, ... by their first appearance."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first, kind="stable"), kind="stable")[inverse].astype(np.int64)


def average_linkage(distance: csr_matrix, constraints: PairAnswers | None = None) -> Dendrogram:
    """Hierarchical clustering in which two clusters are as far apart as their images are on average.

    Args:
        distance: (N, N) symmetric, in 0..1; absent pairs have distance 1.
        constraints: clusters that hold images which must stay apart are never merged. Images that belong together are
            not merged for that; `Constraints.apply` does it for whole clusters, after a cut.

    Returns:
        All merges below distance 1. Distances are taken in steps of 2^-20. Among equal ones the larger cluster is
        merged first, so the order of the images shows only where equal clusters are equally near.

    Source: Sokal and Michener 1958 (UPGMA); chains of nearest neighbours as Benzecri 1982.
    Memory: about 40 bytes for each stored pair. Time: about O(stored pairs * log N), in practice.
    """
    from fastreid_uns.pseudo_labels import linkage_kernels

    n = distance.shape[0]
    pairs = distance.tocoo()
    values = np.rint((1.0 - pairs.data.astype(np.float64)) * _UNIT).astype(np.int64)
    kept = (pairs.row != pairs.col) & (values > 0)
    rows, columns, values = pairs.row[kept], pairs.col[kept], values[kept]
    if constraints is not None:
        apart = constraints.apart()
        rows, columns = np.concatenate([rows, apart[:, 0]]), np.concatenate([columns, apart[:, 1]])
        values = np.concatenate([values, np.full(len(apart), linkage_kernels.NEVER)])
    order = np.lexsort((columns, rows))
    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n))])
    graph = starts.astype(np.int64), columns[order].astype(np.int32), values[order]
    merges, means = linkage_kernels.merge_by_average(*graph)
    return _dendrogram(n, merges, 1.0 - means / _UNIT)


def _dendrogram(count: int, merges: np.ndarray, heights: np.ndarray) -> Dendrogram:
    """Sort merges, given by the lowest images of the two clusters, and number what they make."""
    order = np.argsort(heights, kind="stable")
    node, below = np.arange(count), np.ones(count, np.int64)
    children, sizes = np.empty((len(merges), 2), np.int64), np.empty(len(merges), np.int64)
    for m, (a, b) in enumerate(merges[order]):
        children[m] = node[a], node[b]
        below[a] += below[b]
        node[a], sizes[m] = count + m, below[a]
    return Dendrogram(count, children, heights[order], sizes)


def multi_scale_distance(
    feats: Tensor,
    k1: Sequence[int] = (12, 25, 50),
    k2: int = 6,
    *,
    cosine: float = 0.5,
    max_distance: float = 0.98,
    similarity: PairSimilarity | None = None,
) -> csr_matrix:
    """Jaccard distances of several neighbourhood sizes and the cosine distance, averaged.

    A small neighbourhood tells identities of few images apart, a large one holds together those of many; an average
    needs no knowledge of how many images an identity has.

    Args:
        feats: (N, D) float, unit length.
        k1: neighbours that vote, one number for each Jaccard distance; taken as N if there are fewer images.
        k2: see `jaccard_distance`; at most a third of the neighbours that vote.
        cosine: weight of 1 - cosine, cut to 0..1, in pairs that are near at any size; 0 leaves it out.
        max_distance: pairs farther apart at a size have distance 1 there; four fifths of all pairs share that little.
        similarity: takes the place of the cosine between images that are near by their features, see `reach_of`; others
            do not vote and have a cosine distance of 1.

    Returns:
        As `jaccard_distance`; pairs that are near at no size are absent, whatever their cosine.

    Raises:
        ValueError: as `jaccard_distance`.

    Memory: O(N * max(k1)) beside the result, which holds more pairs the larger the neighbourhoods are. Time: one k-NN
    search for all of them.
    """
    from scipy.sparse import csr_matrix

    sizes = sorted({min(k, len(feats)) for k in k1})
    if min(sizes, default=0) < 2 or k2 < 1:
        raise InvalidValue(f"jaccard distance: k1 is {list(k1)} and k2 is {k2}; at least 2 and 1 are accepted.")
    compared = None if similarity is None else _compared(feats, reach_of(sizes), similarity)
    sq, index = nearest_neighbours(feats, sizes[-1]) if compared is None else _most_similar(compared, sizes[-1])
    shared = csr_matrix((len(feats), len(feats)), dtype=np.float32)
    for k in sizes:
        encoding = encode(feats, sq[:, :k], index[:, :k], k, min(k2, max(k // 3, 1)), lambda rows, distances: distances)
        one = encoding_distance(encoding, max_distance=max_distance)
        one.data = (1 - one.data) / len(sizes)
        shared = shared + one
    shared.sort_indices()
    shared.data = (1 - cosine) * (1 - shared.data)
    if cosine:
        found = _cosine_distances(feats, shared) if compared is None else 1 - _looked_up(compared, shared).clip(0, 1)
        shared.data += cosine * found
    shared.data = np.minimum(np.round(shared.data * 2**20) / 2**20, 1 - 2.0**-20).astype(np.float32)
    shared.setdiag(0)
    return shared


def reach_of(k1: Sequence[int]) -> int:
    """Neighbours of an image, itself included, with which a `similarity` compares it."""
    return math.ceil(_REACH * max(k1))


def near_pairs(feats: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of images of which one is among the k nearest of the other, itself included, each pair once.

    Args:
        feats: (N, D) float, unit length.
        k: taken as N if there are fewer images.

    Returns:
        (M,) int64 first images, ascending, (M,) int64 second ones, which are larger, and (M,) float32 cosines; on the
        CPU.
    """
    count = len(feats)
    sq, index = (found.cpu() for found in nearest_neighbours(feats, min(k, count)))
    images = torch.arange(count)[:, None].expand_as(index)
    keys = torch.minimum(images, index) * count + torch.maximum(images, index)
    pairs, place = keys[:, 1:].reshape(-1).unique(return_inverse=True)
    cosines = torch.empty(len(pairs)).scatter_(0, place, 1 - sq[:, 1:].reshape(-1) / 2)
    return pairs // count, pairs % count, cosines


def _compared(feats: Tensor, k: int, similarity: PairSimilarity) -> csr_matrix:
    """(N, N) symmetric float32 similarities of near pairs."""
    from scipy.sparse import csr_matrix

    first, second, cosines = near_pairs(feats, k)
    found = similarity(first, second, cosines).numpy()
    rows, columns = torch.cat([first, second]).numpy(), torch.cat([second, first]).numpy()
    matrix = csr_matrix((np.concatenate([found, found]), (rows, columns)), shape=(len(feats), len(feats)))
    matrix.sort_indices()
    return matrix


def _most_similar(compared: csr_matrix, k: int) -> tuple[Tensor, Tensor]:
    """As `nearest_neighbours`, by similarities: 2 - 2 * similarity takes the place of the squared distance."""
    count = compared.shape[0]
    itself = np.arange(count)
    rows = np.concatenate([itself, compared.tocoo().row])
    columns = np.concatenate([itself, compared.indices])
    values = np.concatenate([np.full(count, np.inf, np.float32), compared.data])
    order = np.lexsort((columns, -values, rows))
    starts = np.arange(count) + compared.indptr[:-1]
    chosen = order[starts[:, None] + np.arange(k)]
    sq = 2 - 2 * np.minimum(values[chosen], 1)
    return torch.from_numpy(sq.astype(np.float32)), torch.from_numpy(columns[chosen].astype(np.int64))


def _looked_up(compared: csr_matrix, pairs: csr_matrix) -> np.ndarray:
    """Entries of a matrix at those of another one, in their order; 0 where there is none. Indices are sorted."""
    count = compared.shape[0]
    there, wanted = (one.tocoo().row.astype(np.int64) * count + one.indices for one in (compared, pairs))
    place = np.searchsorted(there, wanted).clip(max=len(there) - 1)
    return np.where(there[place] == wanted, compared.data[place], 0)


def _cosine_distances(feats: Tensor, pairs: csr_matrix, block: int = 1 << 18) -> np.ndarray:
    """1 - cosine, cut to 0..1, of the entries of a matrix, in their order."""
    rows, unit = pairs.tocoo().row, feats.detach().float()
    found = np.empty(pairs.nnz, np.float32)
    for start in range(0, pairs.nnz, block):
        part = slice(start, start + block)
        first, second = (torch.from_numpy(side[part]).to(unit.device) for side in (rows, pairs.indices))
        found[part] = (1 - (unit[first] * unit[second]).sum(1)).clamp(0, 1).cpu().numpy()
    return found


@PSEUDO_LABEL_REGISTRY.register()
class AverageLinkageLabels(PseudoLabelGenerator):
    """Average linkage over k-reciprocal Jaccard distances of several sizes and the cosine distance.

    Args:
        threshold: average distance up to which clusters are merged, in (0, 1).
        k1: neighbours that vote, the image itself included, one number for each Jaccard distance.
        k2: neighbours over which the encoding is averaged; 1 switches it off.
        cosine: weight of the cosine distance in 0..1; 0 leaves it out.
        min_size: images of a cluster; those of smaller ones are outliers. 1 leaves no outlier.

    Attributes:
        dendrogram: of the last call; None before.

    Raises:
        ValueError: a parameter out of range.
    """

    def __init__(
        self,
        *,
        threshold: float = 0.82,
        k1: Sequence[int] = (12, 25, 50),
        k2: int = 6,
        cosine: float = 0.5,
        min_size: int = 2,
    ) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise InvalidValue(
                f"PSEUDO_LABELS: THRESHOLD is {threshold}; it must lie between 0 and 1, both excluded, because images "
                f"that share no neighbour have distance 1. 0.7 to 0.85 suits most sets."
            )
        if not 0 <= cosine <= 1:
            raise InvalidValue(f"PSEUDO_LABELS: COSINE is {cosine}; a weight from 0 to 1 is accepted. Change it.")
        for key, value, least in (("K1", min(k1, default=0), 2), ("K2", k2, 1), ("MIN_SIZE", min_size, 1)):
            if value < least:
                raise InvalidValue(f"PSEUDO_LABELS: {key} is {value}; it must be at least {least}.")
        self.threshold, self.k1, self.k2, self.cosine, self.min_size = threshold, tuple(k1), k2, cosine, min_size
        self.dendrogram: Dendrogram | None = None

    def __call__(self, bank: FeatureBank, epoch: int) -> PseudoLabels:
        from scipy.sparse import csr_matrix

        with self.timed("neighbours"):
            distance = (
                multi_scale_distance(bank.feats, self.k1, self.k2, cosine=self.cosine)
                if len(bank.feats) > 1
                else csr_matrix((1, 1), dtype=np.float32)
            )
        with self.timed("cluster"):
            self.dendrogram = average_linkage(distance, bank.constraints)
            labels = torch.from_numpy(self.dendrogram.cut(self.threshold))
            if bank.constraints is not None:
                labels = bank.constraints.apply(labels, bank.feats)
            labels = torch.from_numpy(self._large(labels.numpy())).to(bank.feats.device)
            if int(labels.max()) < 0:
                raise NoClusters(self._all_outliers(self.dendrogram))
            return PseudoLabels(labels, centroids(bank.feats, labels))

    def _large(self, labels: np.ndarray) -> np.ndarray:
        """The labels, renumbered, of clusters that are large enough; -1 elsewhere."""
        large = np.bincount(labels)[labels] >= self.min_size
        result = np.full(len(labels), -1, np.int64)
        result[large] = in_order(labels[large])
        return result

    def _all_outliers(self, dendrogram: Dendrogram) -> str:
        nearest = (
            f"the nearest two are {dendrogram.heights[0]:.2f} apart" if len(dendrogram.heights) else "none is near"
        )
        return (
            f"PSEUDO_LABELS: every one of {dendrogram.count:,} images is an outlier at THRESHOLD {self.threshold:.2f} "
            f"and MIN_SIZE {self.min_size}; {nearest}. Raise THRESHOLD or lower MIN_SIZE."
        )
