"""The k-reciprocal Jaccard distance as its textbook form: whole N x N matrices and a loop over images.

An oracle for the sparse code and the baseline of its benchmark; it shares no line with it.
"""

from __future__ import annotations

import numpy as np


def squared_distances(feats: np.ndarray) -> np.ndarray:
    """(N, N) squared Euclidean distances in the precision of `feats`, exactly 0 on the diagonal."""
    norms = (feats**2).sum(1)
    result = np.maximum(norms[:, None] + norms[None, :] - 2 * feats @ feats.T, 0)
    np.fill_diagonal(result, 0)
    return result


def ranking(sq: np.ndarray) -> np.ndarray:
    """(N, N) images by distance; the image itself first, the lower index first where distances are equal."""
    keyed = sq.copy()
    np.fill_diagonal(keyed, -1)
    return np.argsort(keyed, axis=1, kind="stable")


def reciprocal(order: np.ndarray, i: int, k: int) -> np.ndarray:
    """The first k neighbours of i that have i among their own first k, in order."""
    forward = order[i, :k]
    return forward[(order[forward, :k] == i).any(1)]


def weights_before_averaging(weight_sq: np.ndarray, order: np.ndarray, k: int, k1: int) -> np.ndarray:
    """(N, N) weights of the expanded reciprocal sets of the first k neighbours."""
    n = len(order)
    half = int(np.around(k1 / 2)) + 1
    result = np.zeros((n, n), weight_sq.dtype)
    for i in range(n):
        own = reciprocal(order, i, k)
        expanded = own
        for candidate in own:
            others = reciprocal(order, candidate, half)
            if len(np.intersect1d(others, own)) > 2 / 3 * len(others):
                expanded = np.append(expanded, others)
        expanded = np.unique(expanded)
        weight = np.exp(-weight_sq[i, expanded])
        result[i, expanded] = weight / weight.sum()
    return result


def averaged(weights: np.ndarray, order: np.ndarray, k2: int) -> np.ndarray:
    """(N, N) mean of the weights of the first k2 neighbours."""
    return weights if k2 == 1 else np.stack([weights[near].mean(0) for near in order[:, :k2]])


def overlap_distance(weights: np.ndarray, rows: int | None = None) -> np.ndarray:
    """(rows, N) distances 1 - mu / (2 - mu) of the first rows to all."""
    result = np.empty((len(weights) if rows is None else rows, len(weights)), weights.dtype)
    columns = [np.flatnonzero(column) for column in weights.T]
    for i in range(len(result)):
        mu = np.zeros(len(weights), weights.dtype)
        for t in np.flatnonzero(weights[i]):
            mu[columns[t]] += np.minimum(weights[i, t], weights[columns[t], t])
        result[i] = 1 - mu / (2 - mu)
    return np.maximum(result, 0)


def jaccard(feats: np.ndarray, k1: int, k2: int) -> np.ndarray:
    """(N, N) distances as in clustering: k1 columns, the image itself among them."""
    sq = squared_distances(feats)
    order = ranking(sq)[:, :k1]
    return overlap_distance(averaged(weights_before_averaging(sq, order, k1, k1), order, k2))


def reranked(query: np.ndarray, gallery: np.ndarray, k1: int, k2: int, weight: float) -> np.ndarray:
    """(Q, G) distances as in re-ranking: k1 + 1 columns, normalised squares of squared distances."""
    squares = squared_distances(np.concatenate([query, gallery])) ** 2
    original = (squares / squares.max(0)).T
    order = ranking(original)[:, : k1 + 1]
    encoding = averaged(weights_before_averaging(original, order, k1 + 1, k1), order, k2)
    mixed = (1 - weight) * overlap_distance(encoding, len(query)) + weight * original[: len(query)]
    return mixed[:, len(query) :]
