"""Numbers stay with the individuals; every case by hand, and against all assignments of small groupings."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from fastreid_uns.errors import InvalidValue
from fastreid_uns.photos.numbers import stable_numbers


def numbers(old, new, last=0) -> list[int]:
    return stable_numbers(old, new, last).tolist()


def test_first_numbers_follow_the_order_of_the_photos():
    assert numbers([0, 0, 0, 0], [7, 3, 7, 5]) == [1, 2, 1, 3]


def test_the_same_groups_keep_their_numbers_whatever_their_labels():
    assert numbers([4, 4, 9, 2], [1, 1, 0, 5], last=9) == [4, 4, 9, 2]


def test_a_split_keeps_the_number_with_the_larger_part():
    assert numbers([3, 3, 3, 3, 3], [0, 0, 1, 1, 1], last=8) == [9, 9, 3, 3, 3]


def test_an_even_split_keeps_the_number_once():
    found = numbers([3, 3, 3, 3], [0, 0, 1, 1], last=3)
    assert sorted(found) == [3, 3, 4, 4]


def test_merged_groups_take_the_number_of_the_larger():
    assert numbers([1, 2, 2, 2], [0, 0, 0, 0], last=2) == [2, 2, 2, 2]


def test_merged_groups_of_one_size_take_the_older_number():
    assert numbers([5, 5, 2, 2], [0, 0, 0, 0], last=5) == [2, 2, 2, 2]


def test_a_vanished_number_is_never_given_again():
    merged = numbers([1, 2, 2], [0, 0, 0], last=2)
    assert merged == [2, 2, 2]
    assert numbers(merged, [0, 1, 1], last=2) == [3, 2, 2]


def test_the_last_number_counts_even_if_its_group_is_gone():
    assert numbers([1, 0], [0, 1], last=40) == [1, 41]


def test_added_photos_join_or_found_groups():
    assert numbers([1, 1, 2, 0, 0, 0], [0, 0, 1, 1, 2, 2], last=2) == [1, 1, 2, 2, 3, 3]


def test_removed_photos_change_nothing_for_the_others():
    assert numbers([6, 8], [1, 0], last=9) == [6, 8]


def test_the_total_overlap_decides_not_the_largest_pair():
    # 1 -> X shares 3, 1 -> Y shares 3, 2 -> X shares 2: only 1 -> Y with 2 -> X keeps five photos
    old = [1, 1, 1, 1, 1, 1, 2, 2]
    new = [0, 0, 0, 1, 1, 1, 0, 0]
    assert numbers(old, new, last=2) == [2, 2, 2, 1, 1, 1, 2, 2]


def test_no_photos():
    assert numbers([], []) == []


def test_agrees_with_the_best_of_all_assignments():
    rng = np.random.default_rng(0)
    for _ in range(60):
        old, new = rng.integers(0, 5, 14), rng.integers(0, 5, 14)
        found = stable_numbers(old, new, 10)
        kept = int(((found == old) & (old > 0)).sum())
        labels = np.unique(new)
        choices = [0, *(value for value in np.unique(old) if value)]
        best = 0
        for given in itertools.product(choices, repeat=len(labels)):
            used = [value for value in given if value]
            if len(used) == len(set(used)):
                table = dict(zip(labels.tolist(), given, strict=True))
                best = max(best, sum(table[n] == o > 0 for n, o in zip(new.tolist(), old.tolist(), strict=True)))
        assert kept == best
        assert len(np.unique(found)) == len(labels)  # groups stay apart
        assert all(len(np.unique(new[found == number])) == 1 for number in np.unique(found))


def test_twenty_thousand_photos_in_seconds():
    rng = np.random.default_rng(0)
    old = np.concatenate([rng.integers(1, 2000, 10_000), np.arange(2000, 12_000)])
    new = np.where(rng.random(20_000) < 0.1, rng.integers(0, 12_000, 20_000), old)
    start = time.perf_counter()
    found = stable_numbers(old, new, 12_000)
    assert time.perf_counter() - start < 20
    assert (found == old).mean() > 0.85


def test_refuses_what_does_not_fit():
    with pytest.raises(InvalidValue, match="one number >= 0"):
        stable_numbers([1, 2], [1], 0)
    with pytest.raises(InvalidValue, match="one number >= 0"):
        stable_numbers([-1], [1], 0)
