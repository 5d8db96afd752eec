"""Which way is the fastest, also on a machine with other work."""

import itertools
from types import SimpleNamespace

import pytest

from fastreid_uns.utils import timing


@pytest.mark.parametrize("busy", [range(0), range(6), range(6, 12), range(0, 99, 3)])
def test_other_work_on_the_machine_slows_all_actions(busy, monkeypatch):
    now, turns = [0.0], itertools.count()

    def takes(seconds):
        now[0] += seconds * (10 if next(turns) in busy else 1)

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    found = timing.least_seconds(lambda: takes(3.0), lambda: takes(2.0), rounds=6)
    assert found == pytest.approx([3.0, 2.0])
    assert next(turns) == 12
