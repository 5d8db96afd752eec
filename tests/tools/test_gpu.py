"""The command that checks and measures a GPU: limits, records, and the search for the largest batch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import types
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


def test_a_phase_ends_before_the_session(session):
    session.device = "cuda"
    part = session.within(2)
    assert 0 < part.left <= 2
    assert part.run("late", ["true"], 60) == gpu.Done(None, "")
    part.record("feeding", {"form": "host", "device": "cpu"}, {"images_per_second": 7.0})
    session.record("feeding", {"form": "disk", "device": "cpu"}, {"images_per_second": 5.0})
    assert len(measuring.read(session.out / "feeding.json")) == 2
    assert session.within(1e9).end == session.end
    assert list(gpu.PHASES)[-1] == "compile"  # the slowest, and what is missed least


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut_off", [False, True])
def test_tests_that_failed_are_named(workers, cut_off, tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n\n\n@pytest.mark.parametrize('x', ['a', 'b c'])\ndef test_one(x):\n    assert x == 'a'\n\n\n"
        "@pytest.fixture\ndef broken():\n    raise OSError('no disk')\n\n\ndef test_two(broken):\n    pass\n"
    )
    options = ["-v", "-rfE", "-p", "no:cacheprovider", *(["-n", str(workers)] if workers else [])]
    command = [sys.executable, "-m", "pytest", *options, str(file)]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout
    if cut_off:
        output = output.partition("=== ERRORS ===")[0]
    found = gpu.failed_tests(output)
    assert [name.rpartition("::")[2] for name in found] == ["test_one[b c]", "test_two"]


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


@pytest.mark.parametrize(("gpus", "forms"), [(0, {"cuda"}), (1, {"cuda", "cuda:ivf:16"}), (None, {"cuda"})])
def test_faiss_is_measured_on_a_gpu_where_it_finds_one(session, monkeypatch, gpus, forms):
    faiss = types.SimpleNamespace(StandardGpuResources=None, get_num_gpus=lambda: gpus)
    monkeypatch.setitem(sys.modules, "faiss", None if gpus is None else faiss)
    session.device, session.size, measured = "cuda", "full", []
    monkeypatch.setattr(session, "measure", lambda name, case, limit: measured.append((name, case)))
    gpu.labels(session)
    assert {case["form"] for _, case in measured} == forms
    assert {(name, case["device"]) for name, case in measured} == {("pseudo_labels", "cuda")}


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
