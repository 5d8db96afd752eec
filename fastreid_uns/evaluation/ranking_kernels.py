"""The inner loop of ranking, compiled by numba; imported only when first used."""

from __future__ import annotations

import numpy as np

from fastreid_uns.utils.compiled import compiled

_CHUNK = 2048  # stays in the first cache while it is compared with one match after the other


# A sum in 32 bits over a whole slice is what the compiler turns into 16 comparisons at once.
@compiled
def _up_to(values, own):
    count = np.int32(0)
    for j in range(values.shape[0]):
        count = np.int32(count + np.int32(values[j] <= own))
    return count


@compiled
def _below(values, own):
    count = np.int32(0)
    for j in range(values.shape[0]):
        count = np.int32(count + np.int32(values[j] < own))
    return count


@compiled
def _not_numbers(values):
    count = np.int32(0)
    for j in range(values.shape[0]):
        count = np.int32(count + np.int32(values[j] != values[j]))
    return count


@compiled
def count_closer(start, stop, block, offsets, columns, count):
    """Set `count[p]` to how many entries of its row stand before column `columns[p]`, equal values by position.

    It is -1 where the row holds NaN. The rows are `start..stop`; the chosen columns of row i are
    `offsets[i]..offsets[i+1]`.
    """
    for i in range(start, stop):
        row = block[i]
        count[offsets[i] : offsets[i + 1]] = 0
        nan = np.int32(0)
        for begin in range(0, len(row), _CHUNK):
            part = row[begin : begin + _CHUNK]
            nan += _not_numbers(part)
            for p in range(offsets[i], offsets[i + 1]):
                own = row[columns[p]]
                middle = min(max(columns[p] - begin, 0), len(part))
                count[p] += _up_to(part[:middle], own) + _below(part[middle:], own)
        if nan > 0:
            count[offsets[i] : offsets[i + 1]] = -1
