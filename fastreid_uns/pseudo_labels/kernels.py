"""The inner loops of neighbour search and Jaccard distance, compiled by numba; imported only when first used.

Each kernel works on the rows `start..stop` and holds no state, so threads share the rows as they like: what a row
gives, and the order in which it adds up, does not depend on how many threads there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastreid_uns.utils.compiled import compiled

_CHUNK = 64  # products that are looked through at a time
_REST = 0.6  # of the least overlap that counts: what a row keeps back when it looks for others
_GRID = 2.0**20
_ROUND_UP = 1 + 2.0**-30  # more than the rounding of a float64 sum of squares
UNIT = 2**30  # of weights, which are integers: their sums are exact, so no order of images or threads shows


def _compiled(function: Callable, *allowed: str) -> Any:
    """Compile; NaN is refused before any kernel runs, and no sum is reordered unless `reassoc` is allowed."""
    return compiled(function, "nnan", "nsz", *allowed)


def _squared_distance(feats, i, j):
    """Of float32 rows, summed in float64 and rounded once, so that the order of the sum hardly ever shows."""
    total = 0.0
    for c in range(feats.shape[1]):
        difference = np.float64(feats[i, c]) - np.float64(feats[j, c])
        total += difference * difference
    return np.float32(total)


_squared_distance = _compiled(_squared_distance, "reassoc", "contract")


@_compiled
def round_rows(start, stop, feats, mean, rows, scales, lengths, kept, lost):
    """Centre rows and measure them: their length, the length of what is kept of them and of what is lost.

    Rows of 8 bits are written to `rows`, with their scales; if `rows` has no columns, float32 is kept.
    """
    width = feats.shape[1]
    centred = np.empty(width)
    for i in range(start, stop):
        square = 0.0
        peak = 0.0
        for c in range(width):
            value = np.float64(feats[i, c]) - np.float64(mean[c])
            centred[c] = value
            square += value * value
            peak = max(peak, abs(value))
        lengths[i] = np.sqrt(square) * _ROUND_UP
        if rows.shape[1] == 0:
            kept[i] = lengths[i] * (1 + 2.0**-24)
            lost[i] = lengths[i] * 2.0**-24
            continue
        scale = np.float32(peak / 127)
        scales[i] = scale
        inverse = 1 / np.float64(scale) if scale > 0 else 0.0
        square = rest = 0.0
        for c in range(width):
            level = min(max(np.rint(centred[c] * inverse), -127.0), 127.0)
            rows[i, c] = np.int8(level)
            value = level * np.float64(scale)
            square += value * value
            rest += (centred[c] - value) * (centred[c] - value)
        kept[i] = np.sqrt(square) * _ROUND_UP
        lost[i] = np.sqrt(rest) * _ROUND_UP


@_compiled
def _place(sq, index, i, distance, j):
    """Put a neighbour where it belongs by distance and then by index; the first place is the image's own."""
    at = sq.shape[1] - 1
    if distance > sq[i, at] or (distance == sq[i, at] and j > index[i, at]):
        return
    while at > 1 and (sq[i, at - 1] > distance or (sq[i, at - 1] == distance and index[i, at - 1] > j)):
        sq[i, at] = sq[i, at - 1]
        index[i, at] = index[i, at - 1]
        at -= 1
    sq[i, at] = distance
    index[i, at] = j


@_compiled
def _may_enter(sq, index, i, j):
    """Not once a list is full of doubles of lower index."""
    return sq[i, sq.shape[1] - 1] > 0 or j < index[i, sq.shape[1] - 1]


def offer_to_each_other(products, row0, col0, scales, norms, errors, feats, limits, sq, index):
    """Offer the images of two blocks to each other, from `row0` and `col0` on; those within the limits are measured.

    All but `products` is of all images. A block may be offered to itself; each of its pairs counts once then. Returns
    how many pairs were measured.
    """
    height, width = products.shape
    last = sq.shape[1] - 1
    scale, norm = scales[col0 : col0 + width], norms[col0 : col0 + width]
    spare = norm - limits[col0 : col0 + width]
    measured = 0
    for r in range(height):
        i = row0 + r
        own, twice, limit, line = norms[i], np.float32(2) * scales[i], limits[i], products[r]
        begin = r // _CHUNK * _CHUNK if row0 == col0 else 0
        for c0 in range(begin, width, _CHUNK):
            if c0 + _CHUNK <= width:
                products_c, scale_c = line[c0 : c0 + _CHUNK], scale[c0 : c0 + _CHUNK]
                norm_c, spare_c = norm[c0 : c0 + _CHUNK], spare[c0 : c0 + _CHUNK]
                hit = np.int32(0)
                for c in range(_CHUNK):
                    nearness = twice * (scale_c[c] * np.float32(products_c[c])) - own
                    hit |= np.int32(nearness >= min(norm_c[c] - limit, spare_c[c]))
                if not hit:
                    continue
            for c in range(c0, min(c0 + _CHUNK, width)):
                j = col0 + c
                nearness = twice * (scale[c] * np.float32(line[c])) - own
                if nearness < min(norm[c] - limit, spare[c]) or (row0 == col0 and j <= i):
                    continue
                if not (_may_enter(sq, index, i, j) or _may_enter(sq, index, j, i)):
                    continue
                measured += 1
                distance = _squared_distance(feats, i, j)
                if distance <= sq[i, last]:
                    _place(sq, index, i, distance, j)
                    limit = limits[i] = sq[i, last] + errors[i]
                if distance <= sq[j, last]:
                    _place(sq, index, j, distance, i)
                    limits[j] = sq[j, last] + errors[j]
                    spare[c] = norm[c] - limits[j]
        if row0 == col0:
            spare[r] = norm[r] - limit
    return measured


offer_to_each_other = _compiled(offer_to_each_other, "contract")


@_compiled
def keep_farthest(products, norms, row0, col0, farthest):
    """Raise `farthest` to the largest squared distance of a block of float32 products, for its columns and its rows."""
    height, width = products.shape
    for r in range(height):
        line, norm, far = products[r], norms[col0 : col0 + width], farthest[col0 : col0 + width]
        largest = np.float32(0)
        for c in range(width):
            distance = norms[row0 + r] + norm[c] - np.float32(2) * line[c]
            far[c] = max(far[c], distance)
            largest = max(largest, distance)
        farthest[row0 + r] = max(farthest[row0 + r], largest)


@_compiled
def measure_listed(start, stop, feats, images, counts, listed, sq, index):
    """Nearest neighbours of `images` out of their candidates, or out of all images where the count is negative."""
    for r in range(start, stop):
        i = images[r]
        sq[r, 0] = 0
        index[r, 0] = i
        sq[r, 1:] = np.inf
        index[r, 1:] = feats.shape[0]
        if sq.shape[1] == 1:
            continue
        for c in range(feats.shape[0] if counts[r] < 0 else counts[r]):
            j = c if counts[r] < 0 else listed[r, c]
            if j != i:
                _place(sq, index, r, _squared_distance(feats, i, j), j)


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


@_compiled
def pair_distances(start, stop, feats, first, second, distances):
    """Write squared distances of pairs of rows to `distances`."""
    for p in range(start, stop):
        distances[p] = _squared_distance(feats, first[p], second[p])


@_compiled
def averaged_rows(start, stop, order, place, index, k2, indptr, indices, data):
    """Mean of the sparse rows of the first k2 neighbours; returns sizes, columns and values of the rows.

    Values are integers of size 1 / `UNIT`. What is given numbers the images by their `place` in `order`; rows and
    columns of the result are the images themselves.
    """
    total = np.zeros(index.shape[0])
    sizes = np.empty(stop - start, np.int64)
    columns = np.empty(128 * (stop - start), np.int32)
    values = np.empty(128 * (stop - start), np.int32)
    end = 0
    for i in range(start, stop):
        begin = end
        for c in range(k2):
            j = index[place[i], c]
            columns = _room(columns, end + indptr[j + 1] - indptr[j])
            for e in range(indptr[j], indptr[j + 1]):
                t = indices[e]
                if total[t] == 0:
                    columns[end] = t
                    end += 1
                total[t] += data[e]
        values = _room(values, len(columns))
        for e in range(begin, end):
            t = columns[e]
            values[e] = np.int32(np.rint(total[t] / k2 * UNIT))
            total[t] = 0
            columns[e] = order[t]
        sizes[i - start] = end - begin
    return sizes, columns[:end], values[:end]


@_compiled
def transposed(order, indptr, indices, data, width):
    """Columns of sparse rows: where each of `width` begins, places of its rows in `order`, ascending, and values."""
    begin = np.zeros(width + 1, np.int64)
    for e in range(len(indices)):
        begin[indices[e] + 1] += 1
    for t in range(width):
        begin[t + 1] += begin[t]
    end = begin[:-1].copy()
    rows = np.empty(len(indices), np.int32)
    values = np.empty(len(indices), data.dtype)
    for place in range(len(order)):
        for e in range(indptr[order[place]], indptr[order[place] + 1]):
            t = indices[e]
            rows[end[t]] = place
            values[end[t]] = data[e]
            end[t] += 1
    return begin, rows, values


@_compiled
def overlap_distances(start, stop, order, indptr, indices, data, list_indptr, list_rows, list_data, n, limit, once):
    """Jaccard distances of sparse rows, taken in some order, to those n rows with which they share a column.

    The lists hold the n rows column by column, in ascending order; with `once`, where both are the same rows in the
    same order, a row meets only itself and those before it. Returns sizes, other rows and distances up to `limit`;
    distances are rounded to multiples of 2^-20 and lie below 1.

    With `once`, a row first looks along its largest entries only, as long as the others together could reach the least
    overlap that counts; of the rows met there, those are compared in full that can reach it still (prefix filter,
    Chaudhuri et al. 2006, for weights).
    """
    shared = np.zeros(n, np.int32)
    met = np.empty(n + 1, np.int32)
    weights = np.zeros(len(list_indptr) - 1 if once else 0, np.int32)  # of the row, column by column
    sizes = np.empty(stop - start, np.int64)
    columns = np.empty(32 * (stop - start), np.int32)
    values = np.empty(32 * (stop - start), np.float32)
    least = UNIT * (2 * (1 - limit) / (2 - limit) - 1e-5)  # an overlap below is too far apart, without a division
    end = 0
    for place in range(start, stop):
        i = order[place]
        begin = end
        count = 0
        beyond = place + 1 if once else n
        entries = np.arange(indptr[i], indptr[i + 1])
        rest = data[entries].sum()
        if once:
            entries = entries[np.argsort(-data[entries])]
            weights[indices[entries]] = data[entries]
        for e in entries:
            if once and rest < _REST * least:
                break
            own = data[e]
            rest -= own
            for p in range(list_indptr[indices[e]], list_indptr[indices[e] + 1]):
                j = list_rows[p]
                if j >= beyond:
                    break
                before = shared[j]
                met[count] = j
                count += before == 0
                shared[j] = before + min(own, list_data[p])
        columns, values = _room(columns, end + count), _room(values, end + count)
        for m in range(count):
            overlap = shared[met[m]]
            shared[met[m]] = 0
            if overlap + rest < least:
                continue
            if rest > 0:
                overlap = 0
                j = order[met[m]]
                for e in range(indptr[j], indptr[j + 1]):
                    overlap += min(weights[indices[e]], data[e])
                if overlap < least:
                    continue
            mu = overlap / UNIT
            distance = np.float32(np.rint(max(1 - mu / (2 - mu), 0.0) * _GRID) / _GRID)
            if distance <= limit and distance < 1:
                columns[end] = met[m]
                values[end] = distance
                end += 1
        if once:
            weights[indices[entries]] = 0
        sizes[place - start] = end - begin
    return sizes, columns[:end], values[:end]
