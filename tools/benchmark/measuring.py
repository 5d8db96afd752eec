"""What the benchmarks share: cases, a process of its own for each, results in a JSON file, peaks of memory.

A benchmark is a file with its cases and one function that measures a case. Results stand in a list of
`{"case", "result", "environment"}` beside the file, written after each case; cases that are in the list are not
measured again, so that a benchmark can be stopped and run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # no POSIX: nothing runs side by side
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "output/benchmark"  # images, runs, and results at the small size
sys.path.insert(0, str(ROOT))

Case = dict[str, Any]
Record = dict[str, Any]


def main(
    doc: str | None,
    file: str,
    cases: Callable[[str], list[Case]],
    measure: Callable[..., dict[str, Any]],
    check: Callable[[list[Record]], None] = lambda records: None,
) -> None:
    """The command line of a benchmark.

    Args:
        file: of the benchmark; results go beside it.
        cases: size (`small` or `full`) → cases. `device` cuda needs one; `gib` is what a case needs of free memory.
        measure: the values of a case → the numbers of its result; runs in a process of its own.
        check: raises if the results, of which some may be missing, contradict each other.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("full", "small"), default="full", help="small: seconds, to see that it runs")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results first")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if arguments.one:
        print(json.dumps(measure(**json.loads(arguments.one))))
        return
    output = results_file(file, arguments.size)
    if arguments.fresh:
        output.unlink(missing_ok=True)
    records = read(output)
    for case in cases(arguments.size):
        if any(record["case"] == case for record in records) or not _possible(case):
            continue
        records.append({"case": case, **_in_own_process(file, case)})
        check(records)
        output.write_text(json.dumps(records, indent=1) + "\n")
        print(json.dumps({"case": case, "result": records[-1]["result"]}), flush=True)


def results_file(file: str | Path, size: str = "full") -> Path:
    """Where the results of a benchmark stand."""
    return Path(file).with_suffix(".json") if size == "full" else FOLDER / f"{Path(file).stem}_small.json"


def read(file: Path) -> list[Record]:
    """The results so far."""
    return json.loads(file.read_text()) if file.is_file() else []


def record_of(records: Iterable[Record], **case: Any) -> Record | None:
    """The first record whose case has these values, None if it was not measured."""
    return next((record for record in records if case.items() <= record["case"].items()), None)


def result_of(records: Iterable[Record], **case: Any) -> dict[str, Any] | None:
    """The result of the first case that has these values, None if it was not measured."""
    record = record_of(records, **case)
    return record and record["result"]


def _possible(case: Case) -> bool:
    import torch

    if case.get("device") == "cuda" and not torch.cuda.is_available():
        print(f"left out, no GPU: {case}", flush=True)
        return False
    free = free_gib()
    if free is not None and free < case.get("gib", 0):
        print(f"left out, {free:.1f} GiB of memory are free: {case}", flush=True)
        return False
    return True


def _in_own_process(file: str, case: Case) -> dict[str, Any]:
    import torch

    from fastreid_uns.utils.environment import environment

    load = f"{os.getloadavg()[0]:.1f}"  # what else the machine had to do
    done = subprocess.run(command(file, case), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{Path(file).name}: the case {case} ended with {done.returncode}; its message stands above.")
    hardware = environment(torch.device(case.get("device", "cpu")))
    hardware |= {"threads": str(torch.get_num_threads()), "load_before": load}
    return {"result": json.loads(done.stdout.splitlines()[-1]), "environment": hardware}


def command(file: str | Path, case: Case) -> list[str]:
    """What measures one case in a process of its own; the last line of its output is the result."""
    return [sys.executable, str(file), "--one", json.dumps(case)]


@contextmanager
def beside_others() -> Iterator[None]:
    """Work that several cases may do at the same time; it waits while one is measured `alone`."""
    with _lock(alone=False):
        yield


@contextmanager
def alone() -> Iterator[None]:
    """Work whose time counts: it begins when no case works `beside_others`, and others wait for its end."""
    with _lock(alone=True):
        yield


@contextmanager
def _lock(alone: bool) -> Iterator[None]:
    with open(FOLDER / "lock", "w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


@contextmanager
def measured(result: dict[str, Any], name: str = "") -> Iterator[None]:
    """Write the wall seconds of a block to `result`, and by how many GiB its peak stands above the memory before it."""
    prefix = f"{name}_" if name else ""
    with suppress(OSError):  # without it, peaks are those since the process began
        Path("/proc/self/clear_refs").write_text("5")
    before = memory_gib("VmRSS")
    start, used = time.perf_counter(), time.process_time()
    yield
    result[f"{prefix}seconds"] = time.perf_counter() - start
    result[f"{prefix}cpu_seconds"] = time.process_time() - used  # of all threads; tells when the machine was shared
    result[f"{prefix}peak_gib"] = memory_gib("VmHWM") - before


def memory_gib(field: str) -> float:
    """Resident memory (`VmRSS`) of this process, or its peak (`VmHWM`); the peak where there is no /proc."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


def free_gib() -> float | None:
    """Memory that a process may still take, None where it cannot be told."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return None
    return (
        int(next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable")).split()[1]) / 2**20
    )
