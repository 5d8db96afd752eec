"""All steps together, on generated images."""

import pytest

pytestmark = pytest.mark.slow


def test_it_learns_and_a_resumed_run_is_the_same_run(assert_it_learns):
    assert_it_learns("Best/configs/synthetic.yaml")


def test_two_processes_agree_with_each_other_and_with_one(assert_processes_agree):
    assert_processes_agree("Best/configs/synthetic.yaml")
