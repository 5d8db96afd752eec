"""The inner loops of neighbour search and Jaccard distance, compiled by numba; imported only when first used.

Each kernel works on the rows `start..stop` and holds no state, so threads share the rows as they like: what a row
gives, and the order in which it adds up, does not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastreid_uns.utils.compiled import compiled

_CHUNK = 64
_GRID = 2.0**20
UNIT = 2**30  # of weights, which are integers: their sums are exact, so no order of images or threads shows


def _compiled(function: Callable, *allowed: str) -> Any:
    """Compile; NaN is refused before any kernel runs, and no sum is reordered unless `reassoc` is allowed."""
    return compiled(function, "nnan", "nsz", *allowed)


@_compiled
def _insert(sq, index, i, distance, j):
    # A neighbour that comes later has the higher index, so it stands behind those at the same distance.
    at = sq.shape[1] - 1
    while sq[i, at - 1] > distance:
        sq[i, at] = sq[i, at - 1]
        index[i, at] = index[i, at - 1]
        at -= 1
    sq[i, at] = distance
    index[i, at] = j


@_compiled
def offer_columns(start, stop, products, norms, row0, col0, sq, index, farthest):
    """Offer the images of a block's columns to the images of its rows, ascending; keep the nearest of each row."""
    last = sq.shape[1] - 1
    width = products.shape[1]
    distances = np.empty(_CHUNK, np.float32)
    for r in range(start, stop):
        i = row0 + r
        for c0 in range(0, width, _CHUNK):
            size = min(_CHUNK, width - c0)
            near = np.float32(np.inf)
            far = farthest[i]
            for c in range(size):
                d = max(norms[i] + norms[col0 + c0 + c] - np.float32(2) * products[r, c0 + c], np.float32(0))
                distances[c] = d
                near = min(near, d)
                far = max(far, d)
            farthest[i] = far
            if near < sq[i, last]:
                for c in range(size):
                    j = col0 + c0 + c
                    if distances[c] < sq[i, last] and j != i:
                        _insert(sq, index, i, distances[c], j)


@_compiled
def offer_rows(start, stop, products, norms, row0, col0, sq, index, farthest):
    """Offer the images of a block's rows to those of its columns `start..stop`: the same block, seen from the side."""
    last = sq.shape[1] - 1
    distances = np.empty(_CHUNK, np.float32)
    limit = np.empty(_CHUNK, np.float32)
    for c0 in range(start, stop, _CHUNK):
        size = min(_CHUNK, stop - c0)
        first = col0 + c0
        for c in range(size):
            limit[c] = sq[first + c, last]
        for r in range(products.shape[0]):
            i = row0 + r
            hits = 0
            for c in range(size):
                d = max(norms[first + c] + norms[i] - np.float32(2) * products[r, c0 + c], np.float32(0))
                distances[c] = d
                hits += d < limit[c]
                farthest[first + c] = max(farthest[first + c], d)
            if hits:
                for c in range(size):
                    if distances[c] < limit[c]:
                        _insert(sq, index, first + c, distances[c], i)
                        limit[c] = sq[first + c, last]


@_compiled
def place_in_return(start, stop, index, back):
    """Write to `back[i, c]` where i stands in the list of its c-th neighbour; the list's length if absent."""
    k = index.shape[1]
    for i in range(start, stop):
        for c in range(k):
            j = index[i, c]
            at = 0
            while at < k and index[j, at] != i:
                at += 1
            back[i, c] = at


@_compiled
def _room(buffer, needed):
    if needed <= len(buffer):
        return buffer
    larger = np.empty(max(needed, 2 * len(buffer)), buffer.dtype)
    larger[: len(buffer)] = buffer
    return larger


@_compiled
def expanded_sets(start, stop, index, sq, back, half):
    """k-reciprocal neighbours of each row, joined by the sets of those candidates that share over two thirds with it.

    Returns sizes (stop - start), members and squared distances; the distance of a member that neither list holds is
    -1.
    """
    n, k = index.shape
    seen = np.zeros(n, np.int32)  # 1 + 2 row: of the row's own set; 2 + 2 row: added
    sizes = np.empty(stop - start, np.int64)
    members = np.empty(64 * (stop - start), np.int32)
    distances = np.empty(64 * (stop - start), np.float32)
    end = 0
    for i in range(start, stop):
        begin = end
        own, added = 2 * (i - start) + 1, 2 * (i - start) + 2
        members, distances = _room(members, end + k + k * half), _room(distances, end + k + k * half)
        for c in range(k):
            if back[i, c] < k:
                seen[index[i, c]] = own
                members[end] = index[i, c]
                distances[end] = sq[i, c]
                end += 1
        for a in range(begin, end):
            candidate = members[a]
            size = shared = 0
            for c in range(half):
                if back[candidate, c] < half:
                    size += 1
                    shared += seen[index[candidate, c]] == own
            if 3 * shared <= 2 * size:
                continue
            for c in range(half):
                j = index[candidate, c]
                if back[candidate, c] < half and seen[j] != own and seen[j] != added:
                    seen[j] = added
                    members[end] = j
                    distances[end] = _listed_distance(index, sq, i, j)
                    end += 1
        sizes[i - start] = end - begin
    return sizes, members[:end], distances[:end]


@_compiled
def _listed_distance(index, sq, i, j):
    for c in range(index.shape[1]):
        if index[i, c] == j:
            return sq[i, c]
    for c in range(index.shape[1]):
        if index[j, c] == i:
            return sq[j, c]
    return np.float32(-1)


def _pair_distances(start, stop, feats, first, second, distances):
    """Write squared distances of pairs of rows to `distances`."""
    for p in range(start, stop):
        total = np.float32(0)
        for c in range(feats.shape[1]):
            difference = feats[first[p], c] - feats[second[p], c]
            total += difference * difference
        distances[p] = total


# Summed in the lanes of the processor: always in the same order on one machine.
pair_distances = _compiled(_pair_distances, "reassoc")


@_compiled
def averaged_rows(start, stop, index, k2, indptr, indices, data):
    """Mean of the sparse rows of the first k2 neighbours; returns sizes, columns and values of the rows.

    Values are integers of size 1 / `UNIT`.
    """
    total = np.zeros(index.shape[0])
    sizes = np.empty(stop - start, np.int64)
    columns = np.empty(128 * (stop - start), np.int32)
    values = np.empty(128 * (stop - start), np.int32)
    end = 0
    for i in range(start, stop):
        begin = end
        for c in range(k2):
            j = index[i, c]
            columns = _room(columns, end + indptr[j + 1] - indptr[j])
            for e in range(indptr[j], indptr[j + 1]):
                t = indices[e]
                if total[t] == 0:
                    columns[end] = t
                    end += 1
                total[t] += data[e]
        values = _room(values, len(columns))
        for e in range(begin, end):
            values[e] = np.int32(np.rint(total[columns[e]] / k2 * UNIT))
            total[columns[e]] = 0
        sizes[i - start] = end - begin
    return sizes, columns[:end], values[:end]


@_compiled
def overlap_distances(start, stop, indptr, indices, data, list_begin, list_end, list_rows, list_data, n, limit):
    """Jaccard distances of sparse rows to those n rows with which they share a column, up to `limit`.

    Entry e of the rows meets the entries `list_begin[e]..list_end[e]` of the other rows in the same column. Returns
    sizes, other rows and distances; distances are rounded to multiples of 2^-20 and lie below 1.
    """
    shared = np.zeros(n, np.int32)
    met = np.empty(n + 1, np.int32)
    sizes = np.empty(stop - start, np.int64)
    columns = np.empty(32 * (stop - start), np.int32)
    values = np.empty(32 * (stop - start), np.float32)
    least = UNIT * (2 * (1 - limit) / (2 - limit) - 1e-5)  # an overlap below is too far apart, without a division
    end = 0
    for i in range(start, stop):
        begin = end
        count = 0
        for e in range(indptr[i], indptr[i + 1]):
            own = data[e]
            for p in range(list_begin[e], list_end[e]):
                j = list_rows[p]
                before = shared[j]
                met[count] = j
                count += before == 0
                shared[j] = before + min(own, list_data[p])
        columns, values = _room(columns, end + count), _room(values, end + count)
        for m in range(count):
            overlap = shared[met[m]]
            shared[met[m]] = 0
            if overlap < least:
                continue
            mu = overlap / UNIT
            distance = np.float32(np.rint(max(1 - mu / (2 - mu), 0.0) * _GRID) / _GRID)
            if distance <= limit and distance < 1:
                columns[end] = met[m]
                values[end] = distance
                end += 1
        sizes[i - start] = end - begin
    return sizes, columns[:end], values[:end]
