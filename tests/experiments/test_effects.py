"""Paired differences, their intervals and Holm's correction, worked by hand."""

import math

import pytest

from fastreid_uns.experiments.effects import Difference, holm, paired, verdict

T_4 = 2.7764451  # 97.5 % point of the t distribution with 4 degrees of freedom, from a printed table
T_2 = 4.3026527


def test_interval_of_five_paired_seeds():
    one = {1: 11.0, 2: 22.0, 3: 33.0, 4: 44.0, 5: 55.0}
    other = {1: 10.0, 2: 20.0, 3: 30.0, 4: 40.0, 5: 50.0}
    # differences 1..5: mean 3, variance (4 + 1 + 0 + 1 + 4) / 4 = 2.5, standard error sqrt(2.5 / 5)
    found = paired(one, other)
    half = T_4 * math.sqrt(0.5)
    assert (found.seeds, found.mean) == (5, 3.0)
    assert found.low == pytest.approx(3 - half, abs=1e-6)
    assert found.high == pytest.approx(3 + half, abs=1e-6)


def test_the_probability_is_that_of_the_t_distribution():
    # two degrees of freedom have a closed form: P(|T| > t) = 1 - t / sqrt(2 + t^2)
    found = paired({1: 1.0, 2: 2.0, 3: 3.0}, {1: 0.0, 2: 0.0, 3: 0.0})  # mean 2, standard error 1 / sqrt(3)
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert found.high - found.mean == pytest.approx(T_2 / math.sqrt(3), abs=1e-6)


def test_only_seeds_of_both_rows_count():
    assert paired({1: 5.0, 2: 9.0, 3: 100.0}, {1: 1.0, 2: 5.0, 4: 0.0}) == Difference(2, 4.0, 4.0, 4.0, 0.0)


def test_one_seed_shows_nothing():
    found = paired({1: 90.0}, {1: 10.0})
    assert (found.mean, found.low, found.high, found.p) == (80.0, -math.inf, math.inf, 1.0)


def test_rows_that_are_equal_do_not_differ():
    assert paired({1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0}).p == 1.0


def test_holm_by_hand():
    # ascending 0.01, 0.02, 0.03, 0.2 times 4, 3, 2, 1 = 0.04, 0.06, 0.06, 0.2
    assert holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])


def test_holm_never_descends_and_ends_at_one():
    # 0.02 x 3 = 0.06; 0.021 x 2 = 0.042 is raised to 0.06; 0.9 x 1
    assert holm([0.021, 0.9, 0.02]) == pytest.approx([0.06, 0.9, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("mean", "adjusted", "said"), [(1.0, 0.049, "shown"), (-1.0, 0.049, "shown, harmful"), (9.0, 0.05, "not shown")]
)
def test_a_verdict_follows_from_the_adjusted_probability(mean, adjusted, said):
    assert verdict(Difference(5, mean, 0.0, 0.0, 0.01), adjusted) == said
