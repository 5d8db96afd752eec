import gzip
import json
import logging

import pytest

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.profiling import ProfileHook

LABELS = ["PSEUDO_LABELS.MIN_SAMPLES=2", "PSEUDO_LABELS.K1=8", "HOOKS.look.NAME=ProfileHook"]


def run(overrides: list[str]) -> ProfileHook:
    trainer = DefaultTrainer(load_config(overrides=overrides))
    trainer.train()
    return trainer.hook(ProfileHook)


def test_trace_holds_the_chosen_steps(tiny, tmp_path):
    """Two epochs of two steps: steps 2 and 3 are recorded, on both sides of a clustering."""
    keys = ["HOOKS.look.WAIT=0", "HOOKS.look.WARMUP=1", "HOOKS.look.ACTIVE=2"]
    trace, table = run([*tiny, *LABELS, *keys]).written
    assert (trace.parent, table.parent) == (tmp_path / "run/profile",) * 2
    with gzip.open(trace, "rt") as stream:
        names = [event.get("name", "") for event in json.load(stream)["traceEvents"]]
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#1", "ProfilerStep#2"}
    assert sum("Optimizer.step" in name for name in names) >= 2
    assert "convolution" in table.read_text()


def test_a_run_that_ends_early_still_gives_its_trace_and_one_that_is_too_short_says_so(tiny, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    logging.getLogger("fastreid_uns").propagate = True
    cut = [f"HOOKS.look.FOLDER={tmp_path / 'there'}", "HOOKS.look.WAIT=1", "HOOKS.look.WARMUP=1"]
    hook = run([*tiny, *LABELS, *cut, "HOOKS.look.ACTIVE=99"])
    assert [file.name for file in hook.written] == ["trace_rank0.json.gz", "operations_rank0.txt"]
    assert all(file.parent == tmp_path / "there" for file in hook.written)
    assert not caplog.records
    assert run([*tiny, *LABELS, "HOOKS.look.WAIT=50", f"OUTPUT_DIR={tmp_path / 'other'}"]).written == []
    assert "no step after WAIT and WARMUP" in caplog.text


@pytest.mark.parametrize("steps", [{"wait": -1}, {"warmup": -1}, {"active": 0}])
def test_counts_out_of_range(steps):
    with pytest.raises(ValueError, match=r"ProfileHook has WAIT .* ACTIVE from 1"):
        ProfileHook(**steps)
