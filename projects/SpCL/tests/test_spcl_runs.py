"""SpCL as a whole, on generated images."""

import pytest

CONFIG, WITH_SOURCE = "SpCL/configs/synthetic.yaml", "SpCL/configs/synthetic_uda.yaml"


def test_it_learns_and_a_resumed_run_is_the_same_run(check_learning):
    """Not slow: of all projects the cheapest, it speaks for the others in the default suite."""
    check_learning(CONFIG)


@pytest.mark.slow
def test_with_a_source_it_learns_and_a_resumed_run_is_the_same_run(check_learning):
    check_learning(WITH_SOURCE)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, WITH_SOURCE])
def test_two_processes_agree_with_each_other_and_with_one(check_two_processes, config):
    check_two_processes(config)
