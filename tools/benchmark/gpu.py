"""All checks and measurements of a GPU by one command that ends in time.

    python tools/benchmark/gpu.py --deadline 280 --phases tests smoke+resume step labels eval
    python tools/benchmark/gpu.py --device cpu --size small --deadline 600     # to see that it runs

Phases follow each other; a plus puts phases side by side, which is for those that measure no time. Each phase has its
own limit, each part of a phase as well, and all end at the deadline; what was found until then is written. The output
goes to `log.txt`, results to one JSON file for each benchmark, in the form of the files beside this one, and for the
checks to `checks.json`, with the names of tests that failed; all in `--out`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import evaluation
import feeding
import measuring
import memory
import pseudo_labels
import runs
import training_step
from measuring import ROOT

BENCHMARK = Path(__file__).parent
PROJECTS = sorted(path.parents[1].name for path in ROOT.glob("projects/*/configs/synthetic.yaml"))
LEAST = 5.0  # seconds that must be left for a part to begin
PATIENCE = 4  # times as long as a GPU may a CPU take
SINGLE = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}  # of parts that run side by side
# forms that are prepared beside each other; what they hold at a time has to fit the card
STEP_WAVES = (("ours", "fed", "extract", "plain", "deterministic"), ("ACFL", "float32"))
COMPILE_WAVES = (
    ("compile", "fed:compile", "compile:blocks", "extract:compile"),
    ("ACFL:compile", "compile:tuned", "compile:graphs", "compile:max"),
)
# seconds of a form; as long as one compiles, those of its wave that are ready wait, so the slow ones get less
STEP_LIMITS = {"compile:tuned": 75, "compile": 110, "ACFL:compile": 110, "compile:max": 90}
STEP_LIMIT = 140


class Done(NamedTuple):
    """How a command ended."""

    code: int | None  # None: it was not begun, or ended by its limit
    text: str


class Session:
    """Commands with limits, a log, and records of results.

    Args:
        out: folder of the log and the results; made if needed.
        deadline: seconds from now at which everything ends.
        device, size: of the cases, see `measuring.main`.
        only: forms of the training step, or runs; empty = all.
    """

    def __init__(self, out: Path, deadline: float, device: str, size: str, only: list[str]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.device, self.size, self.only = out, device, size, only
        self.start = time.monotonic()
        self.end = self.start + deadline
        self._lock = threading.Lock()
        self._records: dict[str, list[measuring.Record]] = {}

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.end - time.monotonic()

    def within(self, seconds: float) -> Session:
        """The same session with an earlier deadline."""
        part = copy.copy(self)
        part.end = min(self.end, time.monotonic() + self.patient(seconds))
        return part

    def patient(self, limit: float) -> float:
        """A limit for a GPU, or as much longer as a CPU may take."""
        return limit if self.device == "cuda" else PATIENCE * limit

    def say(self, *words: object) -> None:
        """One line on the terminal and in the log."""
        line = f"[{time.monotonic() - self.start:6.1f}] " + " ".join(map(str, words))
        print(line, flush=True)
        self.write(line)

    def write(self, text: str) -> None:
        """Text in the log only."""
        with self._lock, (self.out / "log.txt").open("a") as log:
            log.write(text + "\n")

    def run(self, name: str, command: list[str], limit: float, **environment: str) -> Done:
        """Run a command of this checkout; it ends with its limit, and all that it started."""
        limit = min(self.patient(limit), self.left)
        if limit < LEAST:
            self.say(name, "left out, no time")
            return Done(None, "")
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        begin = time.monotonic()
        with tempfile.TemporaryFile() as output:  # a pipe would be held open by what outlives the command
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code: int | None = None
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            text = output.read().decode(errors="replace")
        how = "ended by its limit" if code is None else f"exit code {code}"
        self.write(f"\n===== {name}: {how}\n{text[-12000:]}\n")
        self.say(name, how, f"after {time.monotonic() - begin:.1f} s")
        return Done(code, text)

    def record(self, name: str, case: measuring.Case, result: dict[str, Any]) -> None:
        """Add a result to `<name>.json`."""
        import torch

        from fastreid_uns.utils.environment import environment

        hardware = environment(torch.device(case.get("device", self.device)))
        with self._lock:
            records = self._records.setdefault(name, [])
            records.append({"case": case, "result": result, "environment": hardware})
            (self.out / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")
        short = {key: round(v, 4) if isinstance(v, float) else v for key, v in result.items() if key in SHOWN}
        self.say("RESULT", name, json.dumps(case), json.dumps(short or result))

    def measure(self, name: str, case: measuring.Case, limit: float, **environment: str) -> bool:
        """Measure one case of a benchmark; whether it came to an end."""
        command = measuring.command(BENCHMARK / f"{name}.py", case)
        environment |= SINGLE if self.device == "cpu" else {}
        done = self.run(f"{name} {json.dumps(case)}", command, limit, **environment)
        if done.code == 0:
            self.record(name, case, json.loads([line for line in done.text.splitlines() if line.startswith("{")][-1]))
        elif done.code is not None:
            self.say(done.text[-600:])
        return done.code == 0

    def train(self, name: str, config: str, limit: float, resume: bool = False, **keys: Any) -> list[dict[str, Any]]:
        """The metrics of a run, whose keys are given with two underscores for each full stop."""
        values = {"MODEL__DEVICE": self.device, "LOG__WRITERS": ["json"], "OUTPUT_DIR": f"output/gpu/{name}", **keys}
        if not resume:
            shutil.rmtree(ROOT / values["OUTPUT_DIR"], ignore_errors=True)
        command = [sys.executable, "tools/train_net.py", "--config-file", config, *(["--resume"] if resume else [])]
        command += [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in values.items()]
        done = self.run(f"train {name}", command, limit, **SINGLE)
        file = ROOT / values["OUTPUT_DIR"] / "metrics.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if done.code == 0 else []


SHOWN = {
    *("images_per_second", "device_peak_gib", "seconds", "seconds_before", "epoch_seconds", "evaluations", "stages"),
    *("batch", "peak_gib", "neighbours_seconds", "after_seconds", "mAP", "seconds_to_first", "last"),
    *("passed", "failed", "loss_apart", "two_runs_differ", "resumed_differs", "equal_labels", "wrong_of_sample"),
}


def tests(session: Session) -> None:
    """The tests that need a GPU."""
    options = ["-m", "gpu", "-v", "-rfE", "--import-mode=importlib", "-p", "no:cacheprovider"]
    options += ["-n", "6"] if importlib.util.find_spec("xdist") else []
    folders = ["tests", "projects"]
    if session.size == "small":
        options, folders = ["-v", "-k", "largest", "-o", "addopts=--import-mode=importlib"], ["tests/tools/test_gpu.py"]
    done = session.run("tests", [sys.executable, "-m", "pytest", "-o", "addopts=", *options, *folders], 170)
    last = done.text.strip().splitlines()[-1:] or [""]
    result = {"passed": done.code == 0, "failed": failed_tests(done.text), "last": last[0]}
    session.record("checks", {"check": "tests"}, result)


def failed_tests(output: str) -> list[str]:
    """Names of the tests that failed by the output of pytest with -v, also by one that was cut off."""
    plain = re.findall(r"^(\S+::.+?) (?:FAILED|ERROR)\b", output, re.MULTILINE)
    by_workers = re.findall(r"^\[gw\d+\] .*?(?:FAILED|ERROR) (\S+::.+?) *$", output, re.MULTILINE)
    summed_up = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE)
    return sorted({*plain, *by_workers, *summed_up})


def configs() -> dict[str, str]:
    """A small run of the core and of each project."""
    return {"core": "configs/quickstart.yaml", **{p: f"projects/{p}/configs/synthetic.yaml" for p in PROJECTS}}


TINY = {"SOLVER__AMP": "none", "SOLVER__ITERS_PER_EPOCH": 6, "CHECKPOINT__PERIOD": 0}


def smoke(session: Session) -> None:
    """Two epochs of the core and of each project on this device and on the CPU, whose losses should agree."""
    images = "import fastreid_uns.builtin; from fastreid_uns.config import load_config; from fastreid_uns.registry "
    images += "import DATASET_REGISTRY as D; D.build(load_config('configs/quickstart.yaml').DATASETS.TRAIN)"
    session.run("images of the smoke runs", [sys.executable, "-c", images], 60)  # drawn once, for all

    def one(name: str, device: str) -> list[dict[str, Any]]:
        keys = {**TINY, "SOLVER__EPOCHS": 2, "TEST__PERIOD": 2, "MODEL__DEVICE": device}
        return session.train(f"smoke-{name}-{device}", configs()[name], 150, **keys)

    def both(name: str) -> None:
        here = one(name, session.device)
        there = here if session.device == "cpu" else one(name, "cpu")
        rows = {
            f"{number}.{key}": (own[key], other.get(key))
            for number, (own, other) in enumerate(zip(here, there, strict=False))
            for key in own
            if key.startswith("loss") or key in ("clusters", "mAP")
        }
        apart = max((abs(a - b) / abs(b) for k, (a, b) in rows.items() if "loss" in k and a and b), default=None)
        result = {"passed": bool(here and there), "loss_apart": apart, "numbers": rows}
        session.record("checks", {"check": "smoke", "run": name, "device": session.device}, result)

    side_by_side(both, chosen(session, configs()))


def resume(session: Session) -> None:
    """Under DETERMINISTIC two runs are equal bit for bit, and so is one that was resumed after its first epoch."""

    def one(name: str) -> None:
        keys = {**TINY, "DETERMINISTIC": True, "SOLVER__EPOCHS": 3, "TEST__PERIOD": 3}
        keys |= {"CHECKPOINT__PERIOD": 1, "CHECKPOINT__KEEP": 9}
        folders = {letter: f"output/gpu/resume-{name}-{letter}" for letter in "abc"}
        config = configs()[name]
        pair = side_by_side(lambda letter: session.train(f"resume-{name}-{letter}", config, 90, **keys), "ab")
        result: dict[str, Any] = {"passed": False}
        if all(pair):
            shutil.rmtree(ROOT / folders["c"], ignore_errors=True)
            begin_from_first(ROOT / folders["a"], ROOT / folders["c"])
            third = session.train(f"resume-{name}-c", config, 90, resume=True, **keys)
            result["two_runs_differ"] = differing(ROOT / folders["a"], ROOT / folders["b"])
            result["resumed_differs"] = differing(ROOT / folders["a"], ROOT / folders["c"]) if third else ["no run"]
            result["passed"] = not result["two_runs_differ"] and not result["resumed_differs"]
        session.record("checks", {"check": "resume", "run": name, "device": session.device}, result)

    side_by_side(one, chosen(session, ("core", "SpCL", "PPLR")))


def begin_from_first(run: Path, folder: Path) -> None:
    """Copy the first checkpoint of a run into a folder, as if it had been stopped there."""
    from fastreid_uns.utils import checkpoint

    folder.mkdir(parents=True)
    first = min(run.glob("checkpoint_*.pth"))
    shutil.copy(first, folder)
    checkpoint.point_to_last(folder / first.name)


def differing(one: Path, two: Path) -> list[str]:
    """Names of the tensors in which the last checkpoints of two runs differ."""
    import torch

    from fastreid_uns.utils import checkpoint

    a, b = (checkpoint.load_checkpoint(checkpoint.last_checkpoint(folder))["model"] for folder in (one, two))
    return sorted(
        name for name in a.keys() | b.keys() if name not in a or name not in b or not torch.equal(a[name], b[name])
    )


def step(session: Session) -> None:
    """Training steps and extraction, nothing compiled."""
    by_waves(session, STEP_WAVES)


def compile_(session: Session) -> None:
    """The same with compiled encoders, in several ways."""
    if session.size == "full":  # the small size has no such form
        by_waves(session, COMPILE_WAVES)


def by_waves(session: Session, waves: Iterable[tuple[str, ...]]) -> None:
    """Forms of the training step; those of one wave start and compile together, and are measured one by one."""
    found = {case["form"]: case for case in of_device(session, training_step.cases(session.size))}
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "6"}
    for wave in waves:
        forms = [form for form in chosen(session, wave) if form in found]
        side_by_side(
            lambda form: session.measure("training_step", found[form], STEP_LIMITS.get(form, STEP_LIMIT), **threads),
            forms,
        )


def labels(session: Session) -> None:
    """The pseudo-label stage, also by faiss where it was built for GPUs."""
    forms = ["exact"]
    if session.device == "cuda":
        forms = ["cuda", *(["cuda:ivf:16"] if faiss_for_gpus() else [])]
    for case in pseudo_labels.cases(session.size, [], forms):
        session.measure("pseudo_labels", case, 120)


def faiss_for_gpus() -> bool:
    """Whether a faiss is installed that finds a GPU."""
    from fastreid_uns.pseudo_labels.search.approximate import on_gpu

    try:
        import faiss
    except ImportError:
        return False
    return on_gpu(faiss)


def eval_(session: Session) -> None:
    """Ranking."""
    for case in of_device(session, evaluation.cases(session.size)):
        session.measure("evaluation", case, 60)


def feed(session: Session) -> None:
    """The loaders."""
    for case in of_device(session, feeding.cases(session.size)):
        session.measure("feeding", case, 60)


def memory_(session: Session) -> None:
    """The largest batches."""
    for case in of_device(session, memory.cases(session.size)):
        session.measure("memory", case, 60)


def whole_runs(session: Session) -> None:
    """Epochs at the size of Market-1501: whole ones of the core, compiled, and short ones of the projects."""
    if session.size == "small":
        found = [runs.case("core", "small", session.device, epochs=2, period=1)]
    else:
        found = [runs.case("core", "market1501", session.device, epochs=4, compile=True, period=2)]
        found += [runs.of_project(project, session.device) for project in runs.PROJECTS]
    for case in found:
        if not session.only or case["run"] in session.only:
            session.measure("runs", case, 200)


class Phase(NamedTuple):
    """What a phase does, and the seconds after which the next one begins."""

    action: Callable[[Session], None]
    limit: float


PHASES = {
    "tests": Phase(tests, 170),
    "smoke": Phase(smoke, 240),
    "resume": Phase(resume, 240),
    "step": Phase(step, 200),
    "labels": Phase(labels, 150),
    "eval": Phase(eval_, 60),
    "feed": Phase(feed, 120),
    "memory": Phase(memory_, 150),
    "runs": Phase(whole_runs, 400),
    "compile": Phase(compile_, 400),
}


def side_by_side(action: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """The results of an action for all items, at most one at a time for each processor."""
    with ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        return list(pool.map(action, items))


def chosen(session: Session, names: Iterable[str]) -> list[str]:
    return [name for name in names if not session.only or name in session.only]


def of_device(session: Session, cases: list[measuring.Case]) -> list[measuring.Case]:
    return [case for case in cases if case["device"] == session.device]


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if a phase broke."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deadline", type=float, required=True, help="seconds after which everything ends")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), help=f"of {', '.join(PHASES)}; + = side by side")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--only", nargs="+", default=[], help="forms of the step, or runs; all others are left out")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ROOT / "output/gpu")))
    options = parser.parse_args(arguments)
    groups = [group.split("+") for group in options.phases]
    for name in (name for group in groups for name in group):
        if name not in PHASES:
            parser.error(f"unknown phase {name}; accepted: {', '.join(PHASES)}")
    measuring.FOLDER.mkdir(parents=True, exist_ok=True)
    session = Session(options.out, options.deadline, options.device, options.size, options.only)
    broken: list[str] = []

    def go(name: str) -> None:
        try:
            PHASES[name].action(session.within(PHASES[name].limit))
        except Exception:  # the phases after it are to run
            broken.append(name)
            session.say(f"phase {name} broke: {traceback.format_exc()[-1500:]}")

    for group in groups:
        side_by_side(go, group)
    session.say(f"end, {session.left:.0f} s left")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
