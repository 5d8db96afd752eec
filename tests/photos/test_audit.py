"""Pairs inside groups, the posterior after answers, and confidence that agrees with it."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from fastreid_uns.photos.audit import (
    PairPrecision,
    audit_pairs,
    calibrated,
    pair_precision,
    pairs_inside,
    rough_estimate,
)


def test_all_pairs_of_all_groups_are_drawn_where_there_are_few():
    labels = np.array([1, 0, 1, 0, 1, 2])
    found = pairs_inside(labels, 15)
    assert sorted(map(tuple, found.tolist())) == [(0, 2), (0, 4), (1, 3), (2, 4)]


def test_pairs_are_drawn_once_each_with_the_same_chance():
    labels = np.repeat([0, 1], [3, 12])  # 3 and 66 pairs
    drawn = Counter(tuple(pair) for seed in range(2000) for pair in pairs_inside(labels, 5, seed).tolist())
    assert all(labels[a] == labels[b] and a < b for a, b in drawn)
    assert len(drawn) == 69
    assert sum(drawn.values()) == 10_000
    assert max(drawn.values()) < 200  # 145 are expected of each
    assert min(drawn.values()) > 95
    for seed in range(20):
        assert len({tuple(pair) for pair in pairs_inside(labels, 15, seed).tolist()}) == 15


def test_no_pair_where_all_are_alone():
    assert pairs_inside(np.arange(4)).shape == (0, 2)
    assert pairs_inside(np.zeros(0, np.int64)).shape == (0, 2)
    assert rough_estimate(np.full(4, 0.5), np.arange(4)) == 1


def test_the_posterior_counts_the_estimate_as_three_answers():
    found = pair_precision(0.5, same=12, different=3)
    assert found.estimate == pytest.approx((1.5 + 12) / 18)
    assert found.low < found.estimate < found.high
    assert found.verified
    assert pair_precision(0.5, 0, 0).estimate == pytest.approx(0.5)
    assert not pair_precision(1.0, 14, 0).verified


def test_what_it_says():
    assert str(PairPrecision(0.84, 0.75, 0.93, 15)) == "of 100 pairs in one group about 84 ± 9 are the same individual"
    assert "unverified: 3 of 15" in str(PairPrecision(0.84, 0.75, 0.93, 3))


def mean_product(confidence, labels):
    pairs = [(a, b) for a, b in combinations(range(len(labels)), 2) if labels[a] == labels[b]]
    return np.mean([confidence[a] * confidence[b] for a, b in pairs])


def test_the_rough_estimate_is_the_root_of_the_mean_product_over_pairs():
    confidence, labels = np.array([0.9, 0.5, 0.8, 0.3]), np.array([0, 0, 0, 1])
    assert rough_estimate(confidence, labels) ** 2 == pytest.approx(mean_product(confidence, labels))


@pytest.mark.parametrize("precision", [0.2, 0.6, 0.95])
def test_calibrated_confidence_agrees_with_the_precision_and_keeps_its_order(precision):
    rng = np.random.default_rng(0)
    confidence, labels = rng.random(50), rng.integers(0, 8, 50)
    labels[7] = 8
    found = calibrated(confidence, labels, precision)
    assert mean_product(found, labels) == pytest.approx(precision, abs=1e-6)
    others = np.arange(50) != 7
    assert np.array_equal(np.argsort(found[others]), np.argsort(confidence[others]))
    assert found[7] == confidence[7]


@pytest.mark.parametrize("truth", [0.3, 0.7, 0.95])
def test_fifteen_answers_bring_the_stated_precision_near_the_truth(truth):
    """With an estimate that is off by 0.2, where doubtful photos are wrong more often."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 10)
    near = []
    for seed in range(300):
        confidence = rng.beta(4 * truth**0.5, 4 * (1 - truth**0.5), 200)
        right = rng.random(200) < confidence
        inside = labels[:, None] == labels
        same = right[:, None] & right
        actual = (same & inside).sum() - right.sum()
        actual /= inside.sum() - 200
        pairs = audit_pairs(labels, confidence, 15, seed)
        assert len(pairs) == 15
        found = int(same[tuple(pairs.T)].sum())
        near.append(abs(pair_precision(min(actual + 0.2, 1), found, 15 - found).estimate - actual) <= 0.15)
    assert np.mean(near) >= 0.85


def test_audit_pairs_come_from_all_classes_of_confidence():
    labels, confidence = np.zeros(60, np.int64), np.linspace(0.01, 1, 60)
    found = confidence[audit_pairs(labels, confidence, 15)].prod(1)
    everything = np.sort([confidence[i] * confidence[j] for j in range(60) for i in range(j)])
    classes = [np.searchsorted(everything, value) * 15 // len(everything) for value in found]
    assert classes == list(range(15))
    assert len(audit_pairs(np.arange(4), np.ones(4))) == 0
    assert len(audit_pairs(np.zeros(3, np.int64), np.ones(3))) == 3
