"""The k-reciprocal Jaccard distance as its textbook form: whole N x N matrices and a loop over images.

An oracle for the sparse code and the baseline of its benchmark; it shares no line with it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def squared_distances(feats: np.ndarray, rows: slice = slice(None)) -> np.ndarray:
    """(rows, N) squared Euclidean distances in the precision of `feats`, exactly 0 from an image to itself."""
    norms = (feats**2).sum(1)
    result = norms[rows, None] + norms[None, :] - 2 * feats[rows] @ feats.T
    np.maximum(result, 0, out=result)
    own = np.arange(len(feats))[rows]
    result[np.arange(len(own)), own] = 0
    return result


def ranking(sq: np.ndarray, k: int, first: int = 0) -> np.ndarray:
    """(rows, k) images by distance; the image itself first, the lower index first where distances are equal.

    The rows are those of the images from `first` on.
    """
    k = min(k, sq.shape[1])
    limits = np.partition(sq, k - 1, axis=1)[:, k - 1]
    result = np.empty((len(sq), k), np.int64)
    for i, (row, limit) in enumerate(zip(sq, limits, strict=True)):
        near = np.flatnonzero(row <= limit)
        keyed = np.where(near == first + i, -1, row[near])
        result[i] = near[np.argsort(keyed, kind="stable")[:k]]
    return result


def neighbours(feats: np.ndarray, k: int, block: int = 1024) -> np.ndarray:
    """(N, k) `ranking` of all images, a block of rows at a time."""
    starts = range(0, len(feats), block)
    return np.concatenate([ranking(squared_distances(feats, slice(a, a + block)), k, a) for a in starts])


def reciprocal(order: np.ndarray, i: int, k: int) -> np.ndarray:
    """The first k neighbours of i that have i among their own first k, in order."""
    forward = order[i, :k]
    return forward[(order[forward, :k] == i).any(1)]


def weights_before_averaging(
    exponent: Callable[[int, np.ndarray], np.ndarray], order: np.ndarray, k: int, k1: int
) -> np.ndarray:
    """(N, N) weights exp(-x) of the expanded reciprocal sets of the first k neighbours, rows sum to 1."""
    n = len(order)
    half = int(np.around(k1 / 2)) + 1
    result = np.zeros((n, n), exponent(0, order[0, :1]).dtype)
    for i in range(n):
        own = reciprocal(order, i, k)
        expanded = own
        for candidate in own:
            others = reciprocal(order, candidate, half)
            if len(np.intersect1d(others, own)) > 2 / 3 * len(others):
                expanded = np.append(expanded, others)
        expanded = np.unique(expanded)
        weight = np.exp(-exponent(i, expanded))
        result[i, expanded] = weight / weight.sum()
    return result


def averaged(weights: np.ndarray, order: np.ndarray, k2: int) -> np.ndarray:
    """(N, N) mean of the weights of the first k2 neighbours."""
    if k2 == 1:
        return weights
    result = np.empty_like(weights)
    for i, near in enumerate(order[:, :k2]):
        result[i] = weights[near].mean(0)
    return result


def overlap_distance(weights: np.ndarray, rows: int | None = None) -> np.ndarray:
    """(rows, N) distances 1 - mu / (2 - mu) of the first rows to all."""
    result = np.empty((len(weights) if rows is None else rows, len(weights)), weights.dtype)
    columns = [np.flatnonzero(column) for column in weights.T]
    for i in range(len(result)):
        mu = np.zeros(len(weights), weights.dtype)
        for t in np.flatnonzero(weights[i]):
            mu[columns[t]] += np.minimum(weights[i, t], weights[columns[t], t])
        result[i] = 1 - mu / (2 - mu)
    return np.maximum(result, 0, out=result)


def jaccard_from(order: np.ndarray, feats: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """(N, N) distances as in clustering, from k1 neighbours of each image, the image itself among them."""

    def exponent(i: int, members: np.ndarray) -> np.ndarray:
        return ((feats[members] - feats[i]) ** 2).sum(1)

    return overlap_distance(averaged(weights_before_averaging(exponent, order, k1, k1), order, k2))


def jaccard(feats: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """(N, N) distances as in clustering: k1 columns, the image itself among them."""
    return jaccard_from(neighbours(feats, k1), feats, k1, k2)


def reranked(query: np.ndarray, gallery: np.ndarray, k1: int, k2: int, weight: float) -> np.ndarray:
    """(Q, G) distances as in re-ranking: k1 + 1 columns, normalised squares of squared distances."""
    squares = squared_distances(np.concatenate([query, gallery])) ** 2
    original = (squares / squares.max(0)).T
    order = ranking(original, k1 + 1)
    weights = weights_before_averaging(lambda i, members: original[i, members], order, k1 + 1, k1)
    mixed = (1 - weight) * overlap_distance(averaged(weights, order, k2), len(query)) + weight * original[: len(query)]
    return mixed[:, len(query) :]
