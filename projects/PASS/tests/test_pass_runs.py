"""PASS as a whole, on generated images and from random weights."""

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("config", ["synthetic", "synthetic_necks"])
def test_it_learns_and_a_resumed_run_is_the_same_run(assert_it_learns, config):
    assert_it_learns(f"PASS/configs/{config}.yaml")


def test_two_processes_agree_with_each_other_and_with_one(assert_processes_agree):
    assert_processes_agree("PASS/configs/synthetic_necks.yaml")
