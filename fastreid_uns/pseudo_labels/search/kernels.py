"""The inner loops of neighbour search, compiled by numba; imported only when first used.

What a pair of images gives does not depend on how many threads there are, nor on the order of the pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastreid_uns.utils.compiled import compiled

_CHUNK = 64  # products that are looked through at a time
_ROUND_UP = 1 + 2.0**-30  # more than the rounding of a float64 sum of squares


def nnan_fastmath(function: Callable, *allowed: str) -> Any:
    """Compile; NaN is refused before any kernel runs, and no sum is reordered unless `reassoc` is allowed."""
    return compiled(function, "nnan", "nsz", *allowed)


def squared_distance(feats, i, j):
    """Of float32 rows, summed in float64 and rounded once, so that the order of the sum hardly ever shows."""
    total = 0.0
    for c in range(feats.shape[1]):
        difference = np.float64(feats[i, c]) - np.float64(feats[j, c])
        total += difference * difference
    return np.float32(total)


squared_distance = nnan_fastmath(squared_distance, "reassoc", "contract")


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


round_rows = nnan_fastmath(round_rows, "reassoc", "contract")  # `_ROUND_UP` covers sums in any order


@nnan_fastmath
def _place(sq, index, i, distance, j, first):
    """Put a neighbour where it belongs by distance and then by index; places before `first` are the image's own."""
    at = sq.shape[1] - 1
    if distance > sq[i, at] or (distance == sq[i, at] and j > index[i, at]):
        return
    while at > first and (sq[i, at - 1] > distance or (sq[i, at - 1] == distance and index[i, at - 1] > j)):
        sq[i, at] = sq[i, at - 1]
        index[i, at] = index[i, at - 1]
        at -= 1
    sq[i, at] = distance
    index[i, at] = j


@nnan_fastmath
def _may_enter(sq, index, i, j):
    """Not once a list is full of doubles of lower index."""
    return sq[i, sq.shape[1] - 1] > 0 or j < index[i, sq.shape[1] - 1]


def offer_to_each_other(products, row0, col0, scales, norms, errors, feats, limits, sq, index, groups):
    """Offer the images of two blocks to each other, from `row0` and `col0` on; those within the limits are measured.

    All but `products` is of all images. A block may be offered to itself; each of its pairs counts once then. With
    `groups`, images of one group are not offered to each other, and no place of a list is the image's own. Returns how
    many pairs were measured.
    """
    parted = len(groups) > 0
    first = 0 if parted else 1
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
                if parted and groups[i] == groups[j]:
                    continue
                measured += 1
                distance = squared_distance(feats, i, j)
                if distance <= sq[i, last]:
                    _place(sq, index, i, distance, j, first)
                    limit = limits[i] = min(limit, sq[i, last] + errors[i])
                if distance <= sq[j, last]:
                    _place(sq, index, j, distance, i, first)
                    limits[j] = min(limits[j], sq[j, last] + errors[j])
                    spare[c] = norm[c] - limits[j]
    return measured


offer_to_each_other = nnan_fastmath(offer_to_each_other, "contract")


def note_least(products, row0, col0, scales, norms, least, groups):
    """Lower `least` (N, C), the least estimate of an image to those of a class: the places modulo C in their blocks.

    The two blocks are as in `offer_to_each_other`; nothing is measured.
    """
    height, width = products.shape
    classes = least.shape[1]
    parted = len(groups) > 0
    below = np.full((classes, width), np.inf, np.float32)  # of the columns
    scale, norm, group = scales[col0 : col0 + width], norms[col0 : col0 + width], groups[col0 : col0 + width]
    for r in range(height):
        i = row0 + r
        own, twice, line = norms[i], np.float32(2) * scales[i], products[r]
        beside, under = least[i], below[r % classes]
        for c0 in range(0, width, classes):
            for c in range(c0, min(c0 + classes, width)):
                estimate = own + norm[c] - twice * (scale[c] * np.float32(line[c]))
                if col0 + c == i or (parted and groups[i] == group[c]):
                    estimate = np.float32(np.inf)
                beside[c - c0] = min(beside[c - c0], estimate)
                under[c] = min(under[c], estimate)
    for c in range(width):
        for place in range(classes):
            least[col0 + c, place] = min(least[col0 + c, place], below[place, c])


note_least = nnan_fastmath(note_least, "contract")


@nnan_fastmath
def join_lists(keys, joined):
    """Keep in `joined` (N, k) the k smallest numbers of its rows and those of `keys`, once each; all rows ascend."""
    k = joined.shape[1]
    merged = np.empty(k, joined.dtype)
    for i in range(joined.shape[0]):
        theirs, own = keys[i], joined[i]
        if theirs[0] >= own[k - 1]:
            continue
        x = y = 0
        for at in range(k):
            if theirs[x] < own[y]:
                merged[at] = theirs[x]
                x += 1
            else:
                merged[at] = own[y]
                x += theirs[x] == own[y]
                y += 1
        own[:] = merged


@nnan_fastmath
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


@nnan_fastmath
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
                _place(sq, index, r, squared_distance(feats, i, j), j, 1)
