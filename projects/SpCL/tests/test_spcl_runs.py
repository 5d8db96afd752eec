"""SpCL as a whole, on generated images."""

import pytest

pytestmark = pytest.mark.slow

configs = pytest.mark.parametrize("config", ["SpCL/configs/synthetic.yaml", "SpCL/configs/synthetic_uda.yaml"])


@configs
def test_it_learns_and_a_resumed_run_is_the_same_run(check_learning, config):
    check_learning(config)


@configs
def test_two_processes_agree_with_each_other_and_with_one(check_two_processes, config):
    check_two_processes(config)
