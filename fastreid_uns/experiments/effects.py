"""Whether a method differs from its baseline: paired differences over seeds, their intervals, and Holm's correction."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.05  # of the whole family of comparisons


@dataclass(frozen=True)
class Difference:
    """Paired differences of two rows.

    Attributes:
        seeds: that both rows have.
        mean: difference in points.
        low, high: 95 % interval of the mean, by the t distribution; infinite with fewer than two seeds.
        p: two-sided probability of a mean at least as far from zero if there were no difference; 1 with fewer than
            two seeds.
    """

    seeds: int
    mean: float
    low: float
    high: float
    p: float


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Difference:
    """How far one row is above the other one.

    Args:
        one, other: score by seed.

    Raises:
        ValueError: they have no seed in common.
    """
    differences = [one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]
    count, mean = len(differences), statistics.mean(differences)
    if count < 2:
        return Difference(count, mean, -math.inf, math.inf, 1.0)
    from scipy.stats import t

    error = statistics.stdev(differences) / math.sqrt(count)
    half = float(t.ppf(0.975, count - 1)) * error
    if error == 0:
        return Difference(count, mean, mean, mean, float(mean == 0))
    return Difference(count, mean, mean - half, mean + half, 2 * float(t.sf(abs(mean) / error, count - 1)))


def holm(probabilities: Sequence[float]) -> list[float]:
    """Probabilities adjusted for their number, in the order given.

    Source: Holm 1979: the k-th smallest of m is multiplied by m - k + 1, and is not below those before it.
    """
    adjusted = [0.0] * len(probabilities)
    least = 0.0
    for rank, i in enumerate(sorted(range(len(probabilities)), key=probabilities.__getitem__)):
        least = max(least, min(1.0, (len(probabilities) - rank) * probabilities[i]))
        adjusted[i] = least
    return adjusted


def verdict(difference: Difference, adjusted: float) -> str:
    """What follows from a difference and its adjusted probability."""
    if adjusted >= LEVEL:
        return "not shown"
    return "shown" if difference.mean > 0 else "shown, harmful"
