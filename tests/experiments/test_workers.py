"""Runs that share a process, and processes that die."""

import os

import pytest
import torch

from fastreid_uns.experiments import runs, workers
from fastreid_uns.experiments.runs import Job
from fastreid_uns.experiments.workers import completed


def test_a_run_does_not_depend_on_those_before_it_in_its_process(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    overrides = tuple(word for word in tiny if not word.startswith("OUTPUT_DIR"))
    job = Job("configs/quickstart.yaml", "unsupervised", 1, overrides)
    plan = iter([job, job._replace(kind="supervised", seed=2), job, None])
    first, other, again = completed(lambda: next(plan), tmp_path, 1)
    assert first["results"] == again["results"] != other["results"]


def test_no_run_starts_after_the_end(tmp_path):
    assert list(completed(lambda: Job("absent.yaml", "untrained", 1), tmp_path, 1, until=0.0)) == []


def test_a_process_that_dies_costs_its_own_runs_only(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "attempt", dying)
    jobs = [Job("dies", "untrained", 1), Job("lives", "untrained", 1)]
    plan = iter([*jobs, None])
    records = list(completed(lambda: next(plan), tmp_path, 1))
    assert [record["config"] for record in records] == ["dies", "lives"]
    assert records[0]["lost"]
    assert records[1]["results"] == {}


def dying(job: Job, folder: os.PathLike) -> dict:
    if job.config == "dies":
        os._exit(1)
    return {**job._asdict(), "results": {}}


@pytest.mark.parametrize(
    ("error", "lost"), [(torch.OutOfMemoryError("full"), True), (MemoryError(), True), (ValueError("a loss"), False)]
)
def test_a_run_without_memory_is_lost_and_not_the_worst(error, lost, tmp_path, monkeypatch):
    def failing(job, folder):
        raise error

    monkeypatch.setattr(runs, "run", failing)
    record = runs.attempt(Job("configs/quickstart.yaml", "untrained", 1), tmp_path)
    assert record["error"] == f"{type(error).__name__}: {error}"
    assert record.get("lost", False) is lost
