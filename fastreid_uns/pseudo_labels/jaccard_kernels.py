"""The inner loops of the Jaccard distance, compiled by numba; imported only when first used.

Each kernel works on the rows `start..stop` and holds no state, so threads share the rows as they like: what a row
gives, and the order in which it adds up, does not depend on how many threads there are.
"""

from __future__ import annotations

import numpy as np

from fastreid_uns.pseudo_labels.search.kernels import nnan_fastmath, squared_distance

_REST = 0.8  # of the least overlap that counts: what a row keeps back when it looks for others
_LINE = 16  # numbers of 4 bytes in a line of the cache
_PLACES = 2**14  # in which overlaps are added up; more of them do not fit into the fast part of the cache
_GRID = 2.0**20
_UNIT_BITS = 30
UNIT = 2**_UNIT_BITS  # of weights, which are integers: their sums are exact, so no order of images or threads shows


@nnan_fastmath
def _touch(values, start, stop):
    """Read a number of each line of the cache, so that memory sends them side by side.

    The sum is of no use, but the compiler drops the reading if nobody keeps it.
    """
    total = 0
    for at in range(start, stop, _LINE):
        total += values[at]
    return total


@nnan_fastmath
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


@nnan_fastmath
def _room(buffer, needed):
    if needed <= len(buffer):
        return buffer
    larger = np.empty(max(needed, 2 * len(buffer)), buffer.dtype)
    larger[: len(buffer)] = buffer
    return larger


@nnan_fastmath
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


@nnan_fastmath
def _listed_distance(index, sq, i, j):
    for c in range(index.shape[1]):
        if index[i, c] == j:
            return sq[i, c]
    for c in range(index.shape[1]):
        if index[j, c] == i:
            return sq[j, c]
    return np.float32(-1)


@nnan_fastmath
def pair_distances(start, stop, feats, first, second, distances):
    """Write squared distances of pairs of rows to `distances`."""
    for p in range(start, stop):
        distances[p] = squared_distance(feats, first[p], second[p])


@nnan_fastmath
def averaged_rows(start, stop, order, place, index, k2, indptr, indices, data):
    """Mean of the sparse rows of the first k2 neighbours; returns sizes, columns and values of the rows.

    A neighbour below 0 is none, and does not count; each image must have one.
    Values are integers of size 1 / `UNIT`, none of them zero; those above the mean come first, in descending order.
    What is given numbers the images by their `place` in `order`; rows and columns of the result are the images
    themselves.
    """
    total = np.zeros(index.shape[0])
    sizes = np.empty(stop - start, np.int64)
    columns = np.empty(128 * (stop - start), np.int32)
    values = np.empty(128 * (stop - start), np.int32)
    end = 0
    for i in range(start, stop):
        begin = end
        count = 0
        for c in range(k2):
            j = index[place[i], c]
            if j < 0:
                continue
            count += 1
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
            value = np.int64(np.rint(total[t] / count * UNIT))
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


@nnan_fastmath
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


@nnan_fastmath
def _rounded_up(weight, bits):
    """A weight up to 1, in units of 2^(1 - bits), so that it fits into the bits."""
    cut = _UNIT_BITS + 1 - bits
    return (weight + (1 << cut) - 1) >> cut


@nnan_fastmath
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
            entries = slice(indptr[order[met[m]]], indptr[order[met[m]] + 1])
            overlap = _overlap(weights, indices[entries], data[entries], least)
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


@nnan_fastmath
def _overlap(weights, columns, values, least):
    """Of a row with the entries of another; not to the end if it stays below `least`."""
    overlap, left = np.int64(0), np.int64(UNIT)
    for e in range(len(columns)):
        overlap += min(weights[columns[e]], values[e])
        left -= values[e]
        if overlap + left < least:
            break
    return overlap


@nnan_fastmath
def _jaccard_distance(overlap):
    mu = overlap / UNIT
    return np.float32(np.rint(max(1 - mu / (2 - mu), 0.0) * _GRID) / _GRID)


@nnan_fastmath
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
