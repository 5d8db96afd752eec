"""Several runs at a time, many of them one after the other in the same process."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from fastreid_uns.experiments.runs import Job, attempt


def completed(
    following: Callable[[], Job | None], folder: Path, processes: int, until: float = float("inf")
) -> Iterator[dict[str, Any]]:
    """Records of runs as they end, see `attempt`.

    Args:
        following: the run to start next; None if there is none at the moment. It is asked again when a run has ended.
        folder: of the runs.
        processes: runs at a time.
        until: moment of `time.monotonic` after which no run starts; those under way come to their end.
    """
    running: dict[Future[dict[str, Any]], Job] = {}
    pool = _pool(processes)
    while True:
        while len(running) < processes and time.monotonic() < until and (job := following()) is not None:
            running[pool.submit(attempt, job, folder)] = job
        if not running:
            break
        ended, _ = wait(running, return_when=FIRST_COMPLETED)
        broken = False
        for future in ended:
            job = running.pop(future)
            broken |= isinstance(future.exception(), BrokenProcessPool)
            yield _lost(job) if future.exception() else future.result()
        if broken:  # a process has died, and with it the pool; the jobs of the others are lost as well
            yield from map(_lost, running.values())
            running.clear()
            pool.shutdown()
            pool = _pool(processes)
    pool.shutdown()


def _pool(processes: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["fastreid_uns.experiments.runs"])  # imports once, for all processes
    return ProcessPoolExecutor(processes, context, initializer=_silence)


def _silence() -> None:
    """Leave the console to the parent process; each run has a log in its folder."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _lost(job: Job) -> dict[str, Any]:
    return {**job._asdict(), "error": "its process has ended", "lost": True}
