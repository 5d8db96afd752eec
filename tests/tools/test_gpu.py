"""The command that checks and measures a GPU: limits, records, and the search for the largest batch."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools/benchmark"))
import gpu
import measuring
import memory


@pytest.fixture
def session(tmp_path) -> gpu.Session:
    return gpu.Session(tmp_path / "out", 300, "cpu", "small", [])


@pytest.mark.parametrize("limit", [0, 31, 32, 63, 64, 500, 1000])
def test_the_largest_batch_is_found(limit):
    tried = []
    found = memory.largest(lambda batch: tried.append(batch) or batch <= limit, 32, 640)
    assert found == min(limit, 640) // 32 * 32
    assert len(tried) == len(set(tried)) <= 10


def test_a_command_ends_with_its_limit_and_with_it_all_that_it_started(session, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    session.device = "cuda"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); print('on', flush=True)"
    begin = time.monotonic()
    done = session.run("long", [sys.executable, "-c", f"{code}; time.sleep(60)"], 2)
    assert done == gpu.Done(None, "on\n")
    assert time.monotonic() - begin < 20
    assert "long ended by its limit" in (session.out / "log.txt").read_text()
    time.sleep(5)
    assert not (tmp_path / "alive").exists()


def test_nothing_begins_after_the_deadline(session):
    session.end = time.monotonic() + 1
    assert session.run("late", ["true"], 60) == gpu.Done(None, "")


def test_results_have_the_form_of_the_benchmarks(session):
    session.record("feeding", {"form": "host", "device": "cpu"}, {"images_per_second": 7.0})
    session.record("feeding", {"form": "disk", "device": "cpu"}, {"images_per_second": 5.0})
    records = measuring.read(session.out / "feeding.json")
    assert measuring.result_of(records, form="disk") == {"images_per_second": 5.0}
    assert {"device", "torch", "commit"} <= records[0]["environment"].keys()


def test_a_command_that_fails_leaves_no_record(session, monkeypatch):
    monkeypatch.setattr(
        measuring, "command", lambda file, case: [sys.executable, "-c", "print('{}'); raise SystemExit(3)"]
    )
    assert not session.measure("feeding", {"form": "host"}, 60)
    assert not (session.out / "feeding.json").exists()


def test_an_unknown_phase_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu.main(["--deadline", "9", "--phases", "steps+tests", "--out", str(tmp_path)])
    assert "unknown phase steps; accepted: tests, smoke" in capsys.readouterr().err


@pytest.mark.slow
def test_all_phases_run_on_a_cpu(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--size", "small", "--deadline", "1500", "--out", str(tmp_path)]) == 0
    checks = {(r["case"]["check"], r["case"].get("run")): r["result"] for r in measuring.read(tmp_path / "checks.json")}
    assert [key for key, result in checks.items() if not result["passed"]] == []
    assert {"tests", "smoke", "resume"} == {check for check, _ in checks}
    for name in ("training_step", "pseudo_labels", "evaluation", "feeding", "memory", "runs"):
        assert json.loads((tmp_path / f"{name}.json").read_text()), name
