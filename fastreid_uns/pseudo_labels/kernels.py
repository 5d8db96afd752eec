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
_REST = 0.8  # of the least overlap that counts: what a row keeps back when it looks for others
_LINE = 16  # numbers of 4 bytes in a line of the cache
_PLACES = 2**14  # in which overlaps are added up; more of them do not fit into the fast part of the cache
_GRID = 2.0**20
_ROUND_UP = 1 + 2.0**-30  # more than the rounding of a float64 sum of squares
_UNIT_BITS = 30
UNIT = 2**_UNIT_BITS  # of weights, which are integers: their sums are exact, so no order of images or threads shows


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
    touched = 0
    for i in range(start, stop):
        for c in range(k):
            touched += _touch(index[index[i, c]], 0, k)
        for c in range(k):
            j = index[i, c]
            at = 0
            while at < k and index[j, at] != i:
                at += 1
            back[i, c] = at
    return touched


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

    Values are integers of size 1 / `UNIT`, none of them zero; those above the mean come first, in descending
    order. What is given numbers the images by
    their `place` in `order`; rows and columns of the result are the images themselves.
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
        size = end - begin
        keys = np.empty(size, np.int64)
        large, small = 0, size
        for e in range(begin, end):
            t = columns[e]
            value = np.int64(np.rint(total[t] / k2 * UNIT))
            total[t] = 0
            if value * size > UNIT:
                keys[large] = -value << 32 | order[t]
                large += 1
            elif value > 0:
                small -= 1
                keys[small] = -value << 32 | order[t]
        keys[:large].sort()
        end = begin
        for key in np.concatenate((keys[:large], keys[small:])):
            values[end], columns[end] = -(key >> 32), key & 0xFFFFFFFF
            end += 1
        sizes[i - start] = end - begin
    return sizes, columns[:end], values[:end]


@_compiled
def lists_of_columns(start, stop, begin, order, indptr, indices, data, bits, lists):
    """Write the columns `start..stop` of sparse rows, each from where it begins: place of the row and weight.

    Both share an int32: the row's place in `order`, ascending, and below it `bits` for the weight, rounded up.
    """
    end = begin[start:stop].copy()
    touched = 0
    for place in range(len(order)):
        ahead = order[min(place + 2, len(order) - 1)]
        touched += _touch(indices, indptr[ahead], indptr[ahead + 1]) + _touch(data, indptr[ahead], indptr[ahead + 1])
        entries = slice(indptr[order[place]], indptr[order[place] + 1])
        columns, weights = indices[entries], data[entries]
        for e in range(len(columns)):
            t = columns[e] - start
            if 0 <= t < stop - start:
                lists[end[t]] = place << bits | _rounded_up(weights[e], bits)
                end[t] += 1
    return touched


@_compiled
def _rounded_up(weight, bits):
    """A weight up to 1, in units of 2^(1 - bits), so that it fits into the bits."""
    cut = _UNIT_BITS + 1 - bits
    return (weight + (1 << cut) - 1) >> cut


@_compiled
def _touch(values, start, stop):
    """Read a number of each line of the cache, so that memory sends them side by side.

    The sum is of no use, but the compiler drops the reading if nobody keeps it.
    """
    total = 0
    for at in range(start, stop, _LINE):
        total += values[at]
    return total


@_compiled
def near_rows(start, stop, order, indptr, indices, data, begin, lists, bits, limit):
    """Jaccard distances up to `limit` of each row, taken in some order, to itself and those before it.

    A row's largest entries come first; its lists are those of `lists_of_columns`. Returns sizes, places of the
    other rows and distances, rounded to multiples of 2^-20.

    A row looks along its largest entries only, as long as the others together could reach the least overlap that
    counts (prefix filter, Chaudhuri et al. 2006, for weights). Of the rows met there, those are compared that can reach
    it still; what a row shares is added up in one of few places, by the last bits of its own, which can only raise it.
    """
    n = len(order)
    shared = np.zeros(_PLACES, np.int32)
    met = np.empty(_PLACES, np.int32)
    compared = np.full(n, -1, np.int32)  # with which row last
    weights = np.zeros(len(begin) - 1, np.int32)  # of the row, column by column
    sizes = np.empty(stop - start, np.int64)
    columns = np.empty(32 * (stop - start), np.int32)
    values = np.empty(32 * (stop - start), np.float32)
    least = np.int64(UNIT * (2 * (1 - limit) / (2 - limit) - 1e-5))  # an overlap below is too far apart
    below = np.int32((1 << bits) - 1)
    touched = end = 0
    for place in range(start, stop):
        entries = slice(indptr[order[place]], indptr[order[place] + 1])
        own, largest = indices[entries], data[entries]
        rest = np.int64(0)
        for e in range(len(own)):
            weights[own[e]] = largest[e]
            rest += largest[e]
        prefix = 0
        while prefix < len(own) and rest >= _REST * least:
            first, size = begin[own[prefix]], begin[own[prefix] + 1] - begin[own[prefix]]
            touched += _touch(lists, first, first + size * place // n)
            rest -= largest[prefix]
            prefix += 1
        needed, beyond = (least - rest) >> (_UNIT_BITS + 1 - bits), np.int32(place << bits)
        chosen = 0
        for e in range(prefix):
            line = lists[begin[own[e]] : begin[own[e] + 1]]
            weight = np.int32(_rounded_up(largest[e], bits))
            met = _room(met, chosen + len(line))
            for p in range(len(line)):
                if line[p] >= beyond:
                    break
                j = line[p] >> bits
                overlap = shared[j & (_PLACES - 1)] + min(weight, line[p] & below)
                shared[j & (_PLACES - 1)] = overlap
                if overlap >= needed and compared[j] != place:
                    compared[j] = place
                    met[chosen] = j
                    chosen += 1
                    first, last = indptr[order[j]], indptr[order[j] + 1]
                    touched += _touch(indices, first, last) + _touch(data, first, last)
        columns, values = _room(columns, end + chosen + 1), _room(values, end + chosen + 1)
        columns[end], values[end] = place, 0
        before, end = end, end + 1
        for m in range(chosen):
            j = order[met[m]]
            entries = slice(indptr[j], indptr[j + 1])
            others, theirs = indices[entries], data[entries]
            overlap, left = np.int64(0), np.int64(UNIT)
            for e in range(len(others)):
                overlap += min(weights[others[e]], theirs[e])
                left -= theirs[e]
                if overlap + left < least:
                    break
            distance = _jaccard_distance(overlap)
            if distance <= limit:
                columns[end] = met[m]
                values[end] = distance
                end += 1
        shared[:] = 0
        for e in range(len(own)):
            weights[own[e]] = 0
        sizes[place - start] = end - before
    met[0] = touched  # keeps it
    return sizes, columns[:end], values[:end]


@_compiled
def _jaccard_distance(overlap):
    mu = overlap / UNIT
    return np.float32(np.rint(max(1 - mu / (2 - mu), 0.0) * _GRID) / _GRID)


@_compiled
def overlap_distances(start, stop, indptr, indices, data, list_indptr, list_rows, list_data, n, limit):
    """Jaccard distances of sparse rows to those of n other rows, given column by column, with which they share one.

    Returns sizes, other rows and distances up to `limit`; distances are rounded to multiples of 2^-20 and lie below 1.
    """
    shared = np.zeros(n, np.int32)
    met = np.empty(n + 1, np.int32)
    sizes = np.empty(stop - start, np.int64)
    columns = np.empty(32 * (stop - start), np.int32)
    values = np.empty(32 * (stop - start), np.float32)
    end = 0
    for i in range(start, stop):
        first = end
        count = 0
        for e in range(indptr[i], indptr[i + 1]):
            for p in range(list_indptr[indices[e]], list_indptr[indices[e] + 1]):
                j = list_rows[p]
                before = shared[j]
                met[count] = j
                count += before == 0
                shared[j] = before + min(data[e], list_data[p])
        columns, values = _room(columns, end + count), _room(values, end + count)
        for m in range(count):
            distance = _jaccard_distance(shared[met[m]])
            shared[met[m]] = 0
            if distance <= limit and distance < 1:
                columns[end] = met[m]
                values[end] = distance
                end += 1
        sizes[i - start] = end - first
    return sizes, columns[:end], values[:end]
