"""Numbers of groups that stay with the same individuals from one grouping to the next."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_matrix, csr_matrix, hstack
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from fastreid_uns.errors import InvalidValue

ABSENT = 0  # the number of a photo that the old grouping did not hold


def stable_numbers(old: ArrayLike, new: ArrayLike, last: int = 0) -> NDArray[np.int64]:
    """Give each new group the number of the old group with which it shares most photos.

    The assignment of old numbers to new groups has the largest possible number of photos that keep their number.
    So the larger part of a split keeps it, and merged groups take that of the largest among them. Among equals the
    lower, older number stays. Groups that inherit none get fresh numbers in the order of their first photo.

    Args:
        old: (N,) int, number of each photo's group so far; 0 for a photo that is new.
        new: (N,) int, any label of each photo's group now; photos with the same label are one group.
        last: highest number that was ever given, vanished groups included.

    Returns:
        (N,) int64, numbers >= 1. Fresh ones are above `last` and above every old number.

    Raises:
        InvalidValue: the lengths differ, or an old number is negative.
    """
    old, new = np.asarray(old, dtype=np.int64), np.asarray(new, dtype=np.int64)
    if old.shape != new.shape or old.ndim != 1 or (old < 0).any():
        raise InvalidValue(
            f"numbers: old and new groups have shapes {old.shape} and {new.shape}; one number >= 0 and one label for "
            f"each photo are accepted. Hand in both for the same photos."
        )
    labels, first, column = np.unique(new, return_index=True, return_inverse=True)
    numbers = np.zeros(len(labels), dtype=np.int64)
    known = old != ABSENT
    if known.any():
        values, row = np.unique(old[known], return_inverse=True)
        ones = np.ones(len(row), dtype=np.int64)
        overlap = coo_matrix((ones, (row, column[known])), shape=(len(values), len(labels))).tocsr()
        kept, heirs = _assignment(overlap)
        numbers[heirs] = values[kept]
    order = np.argsort(first)
    fresh = order[numbers[order] == ABSENT]
    numbers[fresh] = max(last, int(old.max(initial=0))) + 1 + np.arange(len(fresh))
    return numbers[column]


def _assignment(overlap: csr_matrix) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the assignment with the largest total overlap; lower rows win among equals.

    Each row also has a column of its own that stands for "no heir", so that a full matching always exists. One
    photo of overlap weighs more than all preferences for lower rows together.
    """
    rows, columns = overlap.shape
    preference = np.arange(rows, 0, -1, dtype=np.float64)
    weights = overlap.tocoo()
    weighted = coo_matrix(
        (weights.data * (preference.sum() + rows + 1.0) + preference[weights.row], (weights.row, weights.col)),
        shape=overlap.shape,
    )
    nobody = coo_matrix((np.ones(rows), (np.arange(rows), np.arange(rows))), shape=(rows, rows))
    whole = hstack([weighted, nobody]).tocsr()
    row, column = min_weight_full_bipartite_matching(whole, maximize=True)
    heir = column < columns
    return row[heir], column[heir]
