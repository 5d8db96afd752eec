"""MMT as a whole, on generated images."""

import pytest

pytestmark = pytest.mark.slow

MUTUAL, SOURCE = "MMT/configs/synthetic.yaml", "MMT/configs/synthetic_source.yaml"


@pytest.mark.parametrize("config", [MUTUAL, SOURCE])
def test_it_learns_and_a_resumed_run_is_the_same_run(assert_it_learns, config):
    assert_it_learns(config)


@pytest.mark.parametrize("config", [MUTUAL, SOURCE])
def test_two_processes_agree_with_each_other_and_with_one(assert_processes_agree, config):
    assert_processes_agree(config)
