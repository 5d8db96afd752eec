"""Clusters by a distance that the whole image and its parts share, and the nearest neighbours of each image in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.base import centroids, singletons
from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels, dbscan
from fastreid_uns.pseudo_labels.jaccard import encoding_distance, reciprocal_encoding
from fastreid_uns.registry import PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import FeatureBank, NoClusters, PseudoLabels

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


def mixed_distance(distances: list[csr_matrix], shares: list[float], max_distance: float) -> csr_matrix:
    """The weighted sum of distances, where an absent pair has distance 1.

    Args:
        distances: (N,N) each, symmetric, with their diagonals. Pairs that are farther apart in one of them than
            `max_distance` / its share may be absent from it, as their sum is too large in any case.
        shares: of each in the sum; they add up to 1.
        max_distance: pairs farther apart are left out.

    Returns:
        (N,N) CSR float32, sorted, with its diagonal of zeros.
    """
    near = [share * _nearness(distance) for distance, share in zip(distances, shares, strict=True)]
    mixed = sum(near[1:], near[0]).tocsr()
    mixed.data = np.round((1.0 - mixed.data) * 2**20) / 2**20  # as the distances, so that ties stay ties
    keep = mixed.data <= max_distance
    rows = np.repeat(np.arange(mixed.shape[0]), np.diff(mixed.indptr))
    return _sparse(rows[keep], mixed.indices[keep], mixed.data[keep].astype(np.float32), mixed.shape[0])


def _nearness(distance: csr_matrix) -> csr_matrix:
    """1 - distance; absent pairs are 0."""
    near = distance.astype(np.float64)
    near.data = 1.0 - near.data
    return near


def _sparse(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, count: int) -> csr_matrix:
    from scipy.sparse import csr_matrix

    starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])
    result = csr_matrix((values, columns, starts), shape=(count, count))
    result.sort_indices()
    return result


def neighbour_lists(distance: csr_matrix, radius: float) -> tuple[Tensor, Tensor]:
    """The images within a radius of each image, itself among them, in ascending order and padded.

    Args:
        distance: (N,N) sparse, with its diagonal.
        radius: largest distance.

    Returns:
        (N,m) int64 images, -1 beyond the end of a list, and (N,m) float32 distances; m images in the longest list.
    """
    n = distance.shape[0]
    keep = distance.data <= np.float32(radius)
    rows = np.repeat(np.arange(n), np.diff(distance.indptr))[keep]
    sizes = np.bincount(rows, minlength=n)
    place = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    images = np.full((n, int(sizes.max())), -1)
    values = np.zeros(images.shape, np.float32)
    images[rows, place], values[rows, place] = distance.indices[keep], distance.data[keep]
    return torch.from_numpy(images), torch.from_numpy(values)


@PSEUDO_LABEL_REGISTRY.register()
class NeighbourLabels(DBSCANLabels):
    """DBSCAN over the Jaccard distance, with `extras["neighbours"]` and `extras["neighbour_distance"]` (N,m).

    Where the bank has `extras["parts"]` (N,P,D), the distance is the weighted sum of that of the whole image and of
    those of its parts. The extras are `neighbour_lists` within `radius`.

    Args:
        radius: within which an image is a neighbour, from 0 to `eps`.
        whole: share of the whole image in the distance, in (0, 1]; the parts share the rest evenly.

    Raises:
        ValueError: a parameter out of range.

    Source: GL-NCPLR, official code: the distance of clustering and the neighbours of the refined labels.
    """

    def __init__(self, *, radius: float = 0.2, whole: float = 0.6, **keys: Any) -> None:
        super().__init__(**keys)
        if not 0 <= radius <= self.eps:
            raise InvalidValue(
                f"PSEUDO_LABELS: RADIUS is {radius} and EPS {self.eps}; 0 to EPS is accepted. The paper's code has 0.2."
            )
        if not 0 < whole <= 1:
            raise InvalidValue(f"PSEUDO_LABELS: WHOLE is {whole}; a share in (0, 1] is accepted. The code has 0.6.")
        self.radius, self.whole = radius, whole

    def __call__(self, bank: FeatureBank, epoch: int) -> PseudoLabels:
        with self.timed("neighbours"):
            encoding = self.encoding(bank, epoch)
            distance = self._distance(encoding, bank.extras.get("parts"))
        with self.timed("cluster"):
            labels = torch.from_numpy(dbscan(distance, self.eps, self.min_samples)).to(bank.feats.device)
            if self.outliers == "singletons":
                labels = singletons(labels)
            if int(labels.max()) < 0:
                raise NoClusters(self._all_outliers(encoding))
            images, values = neighbour_lists(distance, self.radius)
            extras = {"neighbours": images.to(labels.device), "neighbour_distance": values.to(labels.device)}
            return PseudoLabels(labels, centroids(bank.feats, labels), extras)

    def _distance(self, encoding: csr_matrix, parts: Tensor | None) -> csr_matrix:
        """Up to `eps`, of the whole image or of it and its parts."""
        if parts is None or self.whole == 1:
            return encoding_distance(encoding, max_distance=self.eps)
        count = parts.shape[1]
        encodings = (reciprocal_encoding(part.contiguous(), self.k1, self.k2, self.nearest) for part in parts.unbind(1))
        shares = [self.whole, *[(1 - self.whole) / count] * count]
        distances = [
            encoding_distance(own, max_distance=min(1.0, self.eps / share))
            for own, share in zip((encoding, *encodings), shares, strict=True)
        ]
        return mixed_distance(distances, shares, self.eps)
