"""MMT as a whole, on generated images."""

import pytest

pytestmark = pytest.mark.slow

MUTUAL, SOURCE = "MMT/configs/synthetic.yaml", "MMT/configs/synthetic_source.yaml"


@pytest.mark.parametrize("config", [MUTUAL, SOURCE])
def test_it_learns_and_a_resumed_run_is_the_same_run(check_learning, config):
    check_learning(config)


@pytest.mark.parametrize("config", [MUTUAL, SOURCE])
def test_two_processes_agree_with_each_other_and_with_one(check_two_processes, config):
    check_two_processes(config)
