"""How good groups are: it cannot be told without answers, and a few about random pairs tell it well."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

PRIOR = 3.0  # answers that the rough estimate counts for
QUESTIONS = 15  # that the commands ask
GOOD = 0.8  # pair precision from which groups can be relied on
_INTERVAL = 0.9
_DRAWN = 4000  # pairs of which those to ask about are chosen


class PairPrecision(NamedTuple):
    """Share of the pairs of photos in one group that show the same individual."""

    estimate: float
    low: float  # of the interval that holds the truth with a probability of 0.9
    high: float
    answers: int

    @property
    def verified(self) -> bool:
        """Enough questions were answered."""
        return self.answers >= QUESTIONS

    def __str__(self) -> str:
        around = round(50 * (self.high - self.low))
        text = f"of 100 pairs in one group about {round(100 * self.estimate)} ± {around} are the same individual"
        return text if self.verified else f"{text} (unverified: {self.answers} of {QUESTIONS} questions answered)"


def pairs_inside(labels: np.ndarray, count: int = QUESTIONS, seed: int = 0) -> np.ndarray:
    """Random pairs of photos of one group, all pairs of all groups with the same chance, none twice.

    Args:
        labels: (N,) int64 groups 0..K-1.
        count: pairs; all there are, if they are fewer.

    Returns:
        (M, 2) int64, the lower photo first, in random order.
    """
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels) if len(labels) else np.zeros(0, np.int64)
    ends = np.cumsum(sizes * (sizes - 1) // 2)
    total = int(ends[-1]) if len(ends) else 0
    generator = np.random.default_rng(seed)
    if total <= 4 * count:
        drawn = generator.permutation(total)[:count]
    else:
        drawn = np.array([], np.int64)
        while len(drawn) < count:  # of many pairs few are drawn twice
            more = np.concatenate([drawn, generator.integers(0, total, count)])
            drawn = more[np.sort(np.unique(more, return_index=True)[1])][:count]
    group = np.searchsorted(ends, drawn, side="right")
    place = drawn - (ends[group] - sizes[group] * (sizes[group] - 1) // 2)
    second = ((1 + np.sqrt(8 * place + 1)) // 2).astype(np.int64)  # pairs (0,1), (0,2), (1,2), (0,3), ...
    first = place - second * (second - 1) // 2
    begin = np.cumsum(sizes) - sizes
    return np.stack([order[begin[group] + first], order[begin[group] + second]], axis=1)


def audit_pairs(labels: np.ndarray, confidence: np.ndarray, count: int = QUESTIONS, seed: int = 0) -> np.ndarray:
    """Random pairs to ask about, one out of each of `count` equally large classes of confidence.

    The classes make the answers tell more than those about as many pairs drawn freely; every pair has the same chance.

    Returns:
        (M, 2) int64, the surest pairs last.
    """
    drawn = pairs_inside(labels, _DRAWN, seed)
    sure = drawn[np.argsort(confidence[drawn].prod(1), kind="stable")]
    generator = np.random.default_rng(seed)
    parts = [part for part in np.array_split(sure, count) if len(part)]
    return np.array([part[generator.integers(len(part))] for part in parts], np.int64).reshape(-1, 2)


def rough_estimate(confidence: np.ndarray, labels: np.ndarray) -> float:
    """Pair precision as the confidence of the photos has it, off by 0.1 on average; 1 without any pair.

    The root of the mean product over pairs, because the photos of a pair are right or wrong together: the product was
    0.2 too low on the training identities of three sets.
    """
    return math.sqrt(_mean_of_pairs(confidence, labels))


def pair_precision(estimate: float, same: int, different: int) -> PairPrecision:
    """The posterior after answers about random pairs inside groups, by a beta prior around a rough estimate.

    Args:
        estimate: in 0..1; it counts for `PRIOR` answers.
        same, different: answers.
    """
    from scipy.stats import beta

    estimate = min(max(estimate, 0.01), 0.99)
    a, b = PRIOR * estimate + same, PRIOR * (1 - estimate) + different
    low, high = beta.ppf([(1 - _INTERVAL) / 2, (1 + _INTERVAL) / 2], a, b)
    return PairPrecision(a / (a + b), float(low), float(high), same + different)


def calibrated(confidence: np.ndarray, labels: np.ndarray, precision: float) -> np.ndarray:
    """Confidence of photos that agrees with a pair precision.

    A pair is right if both of its photos belong to the group; so the mean product over the pairs of all groups is to be
    the precision. The log odds of all photos are shifted by one number, which keeps their order.

    Args:
        confidence: (N,) in 0..1.
        labels: (N,) groups; a photo alone keeps its confidence.
        precision: in 0..1.
    """
    together = np.bincount(labels)[labels] > 1
    if not together.any():
        return confidence.copy()
    odds = np.log(np.clip(confidence, 1e-3, 1 - 1e-3) / (1 - np.clip(confidence, 1e-3, 1 - 1e-3)))
    low, high = -20.0, 20.0
    for _ in range(50):
        shift = (low + high) / 2
        enough = _mean_of_pairs(1 / (1 + np.exp(-odds - shift)), labels) >= precision
        low, high = (low, shift) if enough else (shift, high)
    return np.where(together, 1 / (1 + np.exp(-odds - high)), confidence)


def _mean_of_pairs(confidence: np.ndarray, labels: np.ndarray) -> float:
    """Mean product of the confidence of two photos, over the pairs of all groups."""
    sizes = np.bincount(labels)
    total = np.bincount(labels, confidence) ** 2 - np.bincount(labels, confidence**2)
    pairs = (sizes * (sizes - 1)).sum()
    return float(total.sum() / pairs) if pairs else 1.0
