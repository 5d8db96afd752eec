"""Who stands still is named, who waits for another is not."""

import torch.distributed as dist

from fastreid_uns.utils.watch import Watch


def pair(timeout: float = 10.0) -> tuple[Watch, Watch]:
    store = dist.HashStore()
    return tuple(Watch(store, rank, 2, timeout) for rank in range(2))


def test_a_process_that_has_stopped_answering():
    one, two = pair()
    one.report(7, "training of epoch 2")
    two.report(7, "extract of epoch 3")
    assert two.check(0.0) is None
    assert one.check(0.0) is None
    assert one.check(9.0) is None
    message = one.check(10.0)
    assert message.startswith(
        "process 1 has not answered for 10 s; its last stage: extract of epoch 3, after 7 steps of the run; "
        "process 0: training of epoch 2. "
    )
    assert "DISTRIBUTED.TIMEOUT_MINUTES" in message


def test_a_process_that_never_came():
    one, _ = pair()
    assert one.check(0.0) is None
    assert "last stage: start" in one.check(10.0)


def test_a_process_that_lives_but_makes_no_step():
    one, two = pair()
    one.report(8, "training of epoch 2")
    two.report(7, "training of epoch 2")
    for now in range(0, 10, 2):
        assert two.check(now) is None
        assert one.check(now) is None
    assert two.check(10.0) is None
    assert one.check(10.0).startswith("process 1 has made no step for 10 s")


def test_one_process_may_work_for_all_as_long_as_it_likes():
    one, two = pair()
    one.report(7, "cluster of epoch 3")
    two.report(7, "training of epoch 2")
    for now in range(0, 1000, 5):
        assert one.check(now) is None
        assert two.check(now) is None


def test_a_process_that_has_ended_well_is_not_missed():
    one, two = pair()
    assert two.check(0.0) is None
    assert one.check(0.0) is None
    two.stop()
    assert one.check(100.0) is None
