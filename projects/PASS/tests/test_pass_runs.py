"""PASS as a whole, on generated images and from random weights."""

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("config", ["synthetic", "synthetic_necks"])
def test_it_learns_and_a_resumed_run_is_the_same_run(check_learning, config):
    check_learning(f"PASS/configs/{config}.yaml")


def test_two_processes_agree_with_each_other_and_with_one(check_two_processes):
    check_two_processes("PASS/configs/synthetic_necks.yaml")
