"""DBSCAN on a sparse distance, and the labels that it gives over k-reciprocal Jaccard distance."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator, centroids, singletons
from fastreid_uns.pseudo_labels.jaccard import camera_encoding, encoding_distance, reciprocal_encoding
from fastreid_uns.pseudo_labels.search.approximate import APPROXIMATE, approximate_neighbours
from fastreid_uns.pseudo_labels.search.exact import nearest_neighbours
from fastreid_uns.registry import PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import FeatureBank, NoClusters, PseudoLabels
from fastreid_uns.utils import sharing

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

OUTLIERS = ("drop", "singletons")
DISTANCES = ("jaccard", "camera_jaccard")
SEARCHES = ("exact", *APPROXIMATE)


def dbscan(distance: csr_matrix, eps: float, min_samples: int) -> np.ndarray:
    """Clusters of points that reach one another through dense neighbourhoods.

    Args:
        distance: (N, N) symmetric; absent pairs are farther apart than `eps`.
        eps: radius; a distance equal to it, in the type of `distance`, is inside.
        min_samples: points within the radius, the point itself included, that make a core point.

    Returns:
        (N,) int64, clusters 0..K-1 in order of their first core point, -1 for outliers; a border point belongs to the
        lowest of the clusters that reach it. The same labels as scikit-learn's DBSCAN on the dense matrix.

    Of the processes that share loops, the first clusters; the others get its labels, whatever their distance is.

    Source: Ester et al. 1996. Time: O(stored pairs).
    """
    return sharing.from_first(lambda: _clusters(distance, eps, min_samples))


def _clusters(distance: csr_matrix, eps: float, min_samples: int) -> np.ndarray:
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    n = distance.shape[0]
    rows = np.repeat(np.arange(n), np.diff(distance.indptr))
    inside = (distance.data <= distance.dtype.type(eps)) & (rows != distance.indices)
    a, b = rows[inside], distance.indices[inside]
    core = np.bincount(a, minlength=n) + 1 >= min_samples
    joined = core[a] & core[b]
    graph = csr_matrix((np.ones(joined.sum(), np.int8), (a[joined], b[joined])), shape=(n, n))
    component = connected_components(graph, directed=False)[1][core]
    _, first, component = np.unique(component, return_index=True, return_inverse=True)
    labels = np.full(n, n, np.int64)
    labels[core] = np.argsort(np.argsort(first))[component]
    border = ~core[a] & core[b]
    np.minimum.at(labels, a[border], labels[b[border]])
    labels[labels == n] = -1
    return labels


@PSEUDO_LABEL_REGISTRY.register()
class DBSCANLabels(PseudoLabelGenerator):
    """DBSCAN over the k-reciprocal Jaccard distance, plain or camera-aware.

    Args:
        eps: radius, in (0, 1). Between two images that share no neighbour the distance is 1.
        min_samples: images within the radius, the image itself included, that start a cluster.
        k1: neighbours that vote, the image itself included.
        k2: neighbours over which the encoding is averaged; 1 switches it off.
        distance: `jaccard`, which reads `k1` and `k2`; or `camera_jaccard`, which searches the neighbours in the own
            camera and in all others apart, reads the keys below instead, and needs images of two cameras. Its sets are
            smaller and its distances larger, so `eps` is another one.
        k1_intra, k1_inter, k2_intra, k2_inter: see `jaccard.camera_jaccard_distance`.
        k2_first: both k2 of the camera-aware distance in the first epoch; 0 = those of the other epochs.
        outliers: what becomes of images without a cluster: `drop` leaves them out of the epoch, `singletons` makes each
            a cluster of its own, numbered after the others.
        search: of neighbours; `exact`, or approximate by faiss, with a warning: `ivf` or `hnsw`.
        search_effort: of an approximate search, at least 1: inverted lists that are looked through, or candidates that
            are followed through the graph.

    Raises:
        ValueError: a parameter out of range; in a call, images of one camera only for a camera-aware distance.
        ImportError: `search` is approximate and faiss is not installed; raised by the first clustering.

    Source: Ester et al. 1996 over Zhong et al. 2017, as the clustering papers combine them; the camera-aware distance
    and its first epoch are those of Chen et al. 2024 (CA-Jaccard), official code.

    Example:
        >>> angles = torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1, 3.2])
        >>> bank = FeatureBank(torch.stack([angles.cos(), angles.sin()], dim=1), cameras=torch.full((6,), -1))
        >>> DBSCANLabels(eps=0.9, min_samples=2, k1=3, k2=1)(bank, epoch=0).labels
        tensor([0, 0, 0, 1, 1, 1])
    """

    shared = True

    def __init__(
        self,
        *,
        eps: float = 0.6,
        min_samples: int = 4,
        k1: int = 30,
        k2: int = 6,
        distance: str = "jaccard",
        k1_intra: int = 5,
        k1_inter: int = 20,
        k2_intra: int = 2,
        k2_inter: int = 4,
        k2_first: int = 3,
        outliers: str = "drop",
        search: str = "exact",
        search_effort: int = 64,
    ) -> None:
        super().__init__()
        if not 0 < eps < 1:
            raise InvalidValue(
                f"PSEUDO_LABELS: EPS is {eps}; it must lie between 0 and 1, both excluded, because images that share "
                f"no neighbour have distance 1. The papers use 0.4 to 0.7."
            )
        for key, value, least in (
            ("MIN_SAMPLES", min_samples, 1),
            ("K1", k1, 2),
            ("K2", k2, 1),
            ("K1_INTRA", k1_intra, 0),
            ("K1_INTER", k1_inter, 1),
            ("K2_INTRA", k2_intra, 1),
            ("K2_INTER", k2_inter, 0),
            ("K2_FIRST", k2_first, 0),
            ("SEARCH_EFFORT", search_effort, 1),
        ):
            if value < least:
                raise InvalidValue(f"PSEUDO_LABELS: {key} is {value}; it must be at least {least}.")
        for key, name, accepted in (
            ("OUTLIERS", outliers, OUTLIERS),
            ("DISTANCE", distance, DISTANCES),
            ("SEARCH", search, SEARCHES),
        ):
            if name not in accepted:
                raise InvalidValue(f"PSEUDO_LABELS: {key} is {name!r}; accepted: {', '.join(accepted)}. Change it.")
        if distance == "camera_jaccard" and search != "exact":
            raise InvalidValue(
                f"PSEUDO_LABELS: SEARCH is {search!r} and DISTANCE is camera_jaccard, which is searched exactly only. "
                f"Set SEARCH to exact, or DISTANCE to jaccard."
            )
        self.eps, self.min_samples, self.k1, self.k2, self.outliers = eps, min_samples, k1, k2, outliers
        self.distance, self.k1_intra, self.k1_inter = distance, k1_intra, k1_inter
        self.k2_intra, self.k2_inter, self.k2_first = k2_intra, k2_inter, k2_first
        self.search, self.search_effort = search, search_effort

    def nearest(self, feats: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """What `nearest_neighbours` gives, with the neighbours that SEARCH finds; on the CPU if it is approximate."""
        if self.search == "exact":
            return nearest_neighbours(feats, k)
        found = partial(approximate_neighbours, feats, k, search=self.search, effort=self.search_effort)
        return sharing.from_first(found)

    def encoding(self, bank: FeatureBank, epoch: int) -> csr_matrix:
        """Neighbourhoods of the images by the DISTANCE of the epoch, as `reciprocal_encoding` gives them."""
        if self.distance == "jaccard":
            return reciprocal_encoding(bank.feats, self.k1, self.k2, self.nearest)
        return camera_encoding(bank.feats, bank.cameras, self.k1_intra, self.k1_inter, *self.camera_k2(epoch))

    def camera_k2(self, epoch: int) -> tuple[int, int]:
        """Images of the own camera and of the others over which the camera-aware encoding of an epoch is averaged."""
        return (self.k2_first, self.k2_first) if epoch == 0 and self.k2_first else (self.k2_intra, self.k2_inter)

    def __call__(self, bank: FeatureBank, epoch: int) -> PseudoLabels:
        with self.timed("neighbours"):
            encoding = self.encoding(bank, epoch)
            distance = encoding_distance(encoding, max_distance=self.eps)
        with self.timed("cluster"):
            labels = torch.from_numpy(dbscan(distance, self.eps, self.min_samples)).to(bank.feats.device)
            if self.outliers == "singletons":
                labels = singletons(labels)
            if int(labels.max()) < 0:
                raise NoClusters(self._all_outliers(encoding))
            return PseudoLabels(labels, centroids(bank.feats, labels))

    def _all_outliers(self, encoding: csr_matrix, sample: int = 1000) -> str:
        n = encoding.shape[0]
        some = encoding[np.unique(np.linspace(0, n - 1, min(sample, n)).astype(int))]
        distance = encoding_distance(some, encoding.T.tocsr())
        place = self.min_samples
        rows = (np.sort(distance.data[a:b]) for a, b in pairwise(distance.indptr))
        median = np.median([row[place - 1] if len(row) >= place else 1.0 for row in rows])
        ordinal = {2: "2nd", 3: "3rd"}.get(place, f"{place}th")
        return (
            f"PSEUDO_LABELS: every one of {n:,} images is an outlier at EPS {self.eps:.2f}; the {ordinal} nearest "
            f"distance, counting the image itself, has median {median:.2f}. Raise EPS or lower MIN_SAMPLES."
        )


@PSEUDO_LABEL_REGISTRY.register()
class CameraJaccardLabels(DBSCANLabels):
    """`DBSCANLabels` over the camera-aware distance, under a name of its own.

    Args:
        eps, min_samples, k1_intra, k1_inter, k2_intra, k2_inter, k2_first, outliers: see `DBSCANLabels`.
    """

    def __init__(
        self,
        *,
        eps: float = 0.6,
        min_samples: int = 4,
        k1_intra: int = 5,
        k1_inter: int = 20,
        k2_intra: int = 2,
        k2_inter: int = 4,
        k2_first: int = 3,
        outliers: str = "drop",
    ) -> None:
        super().__init__(
            eps=eps,
            min_samples=min_samples,
            distance="camera_jaccard",
            k1_intra=k1_intra,
            k1_inter=k1_inter,
            k2_intra=k2_intra,
            k2_inter=k2_inter,
            k2_first=k2_first,
            outliers=outliers,
        )
