"""SpCL as a whole, on generated images."""

import pytest

CONFIG, WITH_SOURCE = "SpCL/configs/synthetic.yaml", "SpCL/configs/synthetic_uda.yaml"


def test_it_learns_and_a_resumed_run_is_the_same_run(assert_it_learns):
    """Not slow: of all projects the cheapest, it speaks for the others in the default suite."""
    assert_it_learns(CONFIG)


@pytest.mark.slow
def test_with_a_source_it_learns_and_a_resumed_run_is_the_same_run(assert_it_learns):
    assert_it_learns(WITH_SOURCE)


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, WITH_SOURCE])
def test_two_processes_agree_with_each_other_and_with_one(assert_processes_agree, config):
    assert_processes_agree(config)
