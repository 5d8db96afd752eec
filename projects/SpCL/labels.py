"""Self-paced labels: clusters that are independent of their surroundings, and the compact part of each."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.base import centroids, singletons
from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels, dbscan
from fastreid_uns.pseudo_labels.jaccard import encoding_distance
from fastreid_uns.registry import PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import FeatureBank, NoClusters, PseudoLabels

logger = logging.getLogger(__name__)


@PSEUDO_LABEL_REGISTRY.register()
class SelfPacedLabels(DBSCANLabels):
    """DBSCAN whose clusters must hold at a looser and at a tighter radius; all other images stand alone.

    A cluster is independent if a looser radius joins little to it: it dissolves if the best intersection over union
    with its images' clusters at eps + gap is worse than that of `share` of the clusters of the first epoch that had
    clusters. It is compact where a tighter radius keeps it together: of its images those stay whose overlap with
    their cluster at eps - gap equals the best of the cluster, hence its largest tight part. A cluster whose images are
    all outliers at the tighter radius stays whole, since all are equally good.

    Args:
        gap: between the three radii, > 0; the distance is computed once for all of them.
        share: of the clusters of the first epoch that pass the test of independence, in (0, 1]; with fewer than 16
            clusters a share of 0.9 lets all of them pass.
        independence: apply that test.
        compactness: apply the other one.
        outliers: what becomes of images that DBSCAN or a test leaves without a cluster: `singletons` makes each a
            cluster of its own, numbered after the others; `drop` leaves them out of the epoch.

    Raises:
        ValueError: a parameter out of range.

    Source: Ge et al. 2020 (SpCL), independence and compactness of clusters; differs: numbered without gaps.
    Memory: O(N) beside the sparse distance.
    """

    def __init__(
        self,
        *,
        gap: float = 0.02,
        share: float = 0.9,
        independence: bool = True,
        compactness: bool = True,
        outliers: str = "singletons",
        **keys: Any,
    ) -> None:
        super().__init__(outliers=outliers, **keys)
        if not (gap > 0 and self.eps - gap > 0 and self.eps + gap < 1):
            raise InvalidValue(
                f"PSEUDO_LABELS: GAP is {gap} and EPS {self.eps}; EPS - GAP and EPS + GAP must lie between 0 and 1, "
                f"both excluded, and GAP above 0. The paper uses 0.02."
            )
        if not 0 < share <= 1:
            raise InvalidValue(f"PSEUDO_LABELS: SHARE is {share}; a share in (0, 1] is accepted. The paper uses 0.9.")
        self.gap, self.share, self.independence, self.compactness = gap, share, independence, compactness
        self.bound: float | None = None

    def __call__(self, bank: FeatureBank, epoch: int) -> PseudoLabels:
        with self.timed("neighbours"):
            encoding = self.encoding(bank, epoch)
            distance = encoding_distance(encoding, max_distance=self.eps + self.gap)
        with self.timed("cluster"):
            radii = (self.eps - self.gap, self.eps, self.eps + self.gap)
            tight, normal, loose = (torch.from_numpy(dbscan(distance, eps, self.min_samples)) for eps in radii)
            if int(normal.max()) < 0:
                if self.outliers == "drop":
                    raise NoClusters(self._all_outliers(encoding))
                logger.warning("%s Until then each image is a class of its own.", self._all_outliers(encoding))
            labels = self._numbered(self._stays(tight, normal, loose), normal).to(bank.feats.device)
            return PseudoLabels(labels, centroids(bank.feats, labels))

    def _stays(self, tight: Tensor, normal: Tensor, loose: Tensor) -> Tensor:
        """(N,) bool: whether an image stays in its cluster."""
        tight, whole, loose = singletons(tight), singletons(normal), singletons(loose)
        apart = 1.0 - best_of_label(whole, overlap(whole, loose))
        if self.bound is None and int(normal.max()) >= 0:
            self.bound = independence_bound(apart[whole.bincount() > 1], self.share)
        independent, compact = torch.ones(2, len(normal), dtype=torch.bool)
        if self.independence and self.bound is not None:
            independent = (apart <= self.bound)[whole]
        if self.compactness:
            held = overlap(whole, tight)
            compact = held == best_of_label(whole, held)[whole]
        clustered = normal >= 0
        logger.info(
            "self-paced labels: %d clusters at the radius, %d images outside; independence (bound %s) rejects %d "
            "images, compactness %d",
            int(normal.max()) + 1,
            int((~clustered).sum()),
            "none" if self.bound is None else f"{self.bound:.3f}",
            int((clustered & ~independent).sum()),
            int((clustered & ~compact).sum()),
        )
        return independent & compact

    def _numbered(self, stays: Tensor, normal: Tensor) -> Tensor:
        """(N,) labels without gaps: clusters in their order, then the images that stand alone, or -1 for these."""
        kept = stays & (normal >= 0)
        labels = torch.full_like(normal, -1)
        labels[kept] = normal[kept].unique(return_inverse=True)[1]
        return singletons(labels) if self.outliers == "singletons" else labels

    def state_dict(self) -> dict[str, Any]:
        """The bound of independence that the first clusters have set."""
        return {} if self.bound is None else {"bound": self.bound}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self.bound = state.get("bound")


def overlap(labels: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of the two clusters of each image.

    Args:
        labels, others: (N,) int64 from 0, two clusterings of the same images.

    Returns:
        (N,) float64 in (0, 1]; equal fractions are equal numbers.

    Source: Ge et al. 2020 (SpCL), R_indep and R_comp. Memory: O(N).
    """
    pair = labels * (int(others.max()) + 1) + others
    _, where, count = pair.unique(return_inverse=True, return_counts=True)
    both = count[where]
    return both / (labels.bincount()[labels] + others.bincount()[others] - both).double()


def best_of_label(labels: Tensor, values: Tensor) -> Tensor:
    """(K,) the largest value of the images of each label; labels (N,) 0..K-1, values (N,) >= 0."""
    return values.new_zeros(int(labels.max()) + 1).scatter_reduce_(0, labels, values, "amax")


def independence_bound(apart: Tensor, share: float) -> float | None:
    """The largest distance to independence at which a cluster is trusted.

    Args:
        apart: (clusters,) 1 - best R_indep of each cluster of at least two images.
        share: of the clusters that pass, in (0, 1].

    Returns:
        The value at position round(share * clusters), half to even, in ascending order, at most the last; None
        without clusters.

    Source: Ge et al. 2020 (SpCL), alpha.
    """
    count = len(apart)
    return float(apart.sort().values[min(count - 1, round(share * count))]) if count else None
