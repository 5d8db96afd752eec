"""The loop of average linkage, compiled by numba; imported only when first used."""

from __future__ import annotations

import numpy as np

from fastreid_uns.utils.compiled import compiled

NEVER = -(2**61)  # the similarity of two clusters that must stay apart; it stays what it is, whatever is added


@compiled
def _root(parent, node):
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


@compiled
def _gather(row, start, length, columns, values, parent, total, touched):
    """Add up the entries of a row cluster by cluster, in place.

    Members of a cluster that has been merged since count for the cluster. `total` is zero before and afterwards.
    """
    count = 0
    for e in range(start[row], start[row] + length[row]):
        other = _root(parent, columns[e])
        if other == row:
            continue
        if total[other] == 0:
            touched[count] = other
            count += 1
        apart = total[other] == NEVER or values[e] == NEVER
        total[other] = NEVER if apart else total[other] + values[e]
    for at in range(count):
        columns[start[row] + at] = touched[at]
        values[start[row] + at] = total[touched[at]]
        total[touched[at]] = 0
    length[row] = count


@compiled
def _nearest(row, start, length, columns, values, size, before):
    """The most similar cluster of a gathered row and the mean similarity to it; -1 and 0 if there is none.

    Of equally similar ones it is `before`, else the largest, else the one whose first image comes first.
    """
    best, most = -1, 0.0
    for e in range(start[row], start[row] + length[row]):
        if values[e] <= 0:
            continue
        other = columns[e]
        mean = values[e] / (np.float64(size[row]) * np.float64(size[other]))
        if mean > most:
            best, most = other, mean
        elif mean == most and best != before:
            larger = size[other] > size[best] or (size[other] == size[best] and other < best)
            if other == before or larger:
                best = other
    return best, most


@compiled
def _packed(start, length, columns, values, parent):
    """Move the rows of clusters to the front of the pool, in the order in which they are there; returns its end."""
    used = 0
    for row in np.argsort(start):
        if parent[row] == row:
            for e in range(start[row], start[row] + length[row]):
                columns[used] = columns[e]
                values[used] = values[e]
                used += 1
            start[row] = used - length[row]
    return used


@compiled
def _merge(a, b, start, length, columns, values, parent, size, used):
    """Make cluster b part of cluster a; its row and that of a are copied to the end of the pool, which is returned."""
    if used + length[a] + length[b] > len(columns):
        used = _packed(start, length, columns, values, parent)
    new = used
    for row in (a, b):
        for e in range(start[row], start[row] + length[row]):
            columns[used] = columns[e]
            values[used] = values[e]
            used += 1
    start[a], length[a], length[b] = new, length[a] + length[b], 0
    parent[b] = a
    size[a] += size[b]
    return used


@compiled
def merge_by_average(indptr, columns, values):
    """All merges of clusters of positive mean similarity, along chains of nearest neighbours.

    Args:
        indptr, columns, values: (N, N) symmetric sparse similarities, int64; `NEVER` keeps two images apart.

    Returns:
        (M, 2) the lowest images of the two clusters and (M,) mean similarity of each merge, in an order in which a
        cluster is made before it is merged.
    """
    n, used = len(indptr) - 1, len(columns)
    pool_columns, pool_values = np.empty(2 * used, np.int32), np.empty(2 * used, np.int64)
    pool_columns[:used], pool_values[:used] = columns, values
    start, length = indptr[:-1].copy(), np.diff(indptr)
    parent, size = np.arange(n), np.ones(n, np.int64)
    total, touched, chain = np.zeros(n, np.int64), np.empty(n, np.int64), np.empty(n + 1, np.int64)
    pairs, means = np.empty((n, 2), np.int64), np.empty(n)
    merged = depth = seed = 0
    while True:
        if depth == 0:
            while seed < n and parent[seed] != seed:
                seed += 1
            if seed == n:
                break
            chain[0], depth = seed, 1
        last, before = chain[depth - 1], chain[depth - 2] if depth > 1 else -1
        _gather(last, start, length, pool_columns, pool_values, parent, total, touched)
        nearest, mean = _nearest(last, start, length, pool_columns, pool_values, size, before)
        if nearest < 0:  # then the chain has one cluster, to which nothing is near any more
            seed, depth = seed + 1, 0
        elif nearest != before:
            chain[depth] = nearest
            depth += 1
        else:
            depth -= 2
            a, b = min(last, before), max(last, before)
            pairs[merged, 0], pairs[merged, 1], means[merged] = a, b, mean
            merged += 1
            used = _merge(a, b, start, length, pool_columns, pool_values, parent, size, used)
    return pairs[:merged], means[:merged]
