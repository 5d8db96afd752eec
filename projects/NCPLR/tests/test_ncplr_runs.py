"""NCPLR and GL-NCPLR as a whole, on generated images."""

import pytest

pytestmark = pytest.mark.slow

WITH_PARTS, PLAIN = "NCPLR/configs/synthetic.yaml", "NCPLR/configs/synthetic_plain.yaml"


@pytest.mark.parametrize("config", [WITH_PARTS, PLAIN])
def test_it_learns_and_a_resumed_run_is_the_same_run(assert_it_learns, config):
    assert_it_learns(config)


def test_two_processes_agree_with_each_other_and_with_one(assert_processes_agree):
    assert_processes_agree(WITH_PARTS)
