"""What becomes of a run that is killed, of files that are damaged, and of wrong input: a trial by force.

Each trial does harm to a training command on a few generated images, then goes on with `--resume`, and compares the
record of the run (weights, metrics without times, best file, names of all files) with that of a run without harm. Wrong
input must end with exit code 2 and a message, never with a traceback, and never with 0.

    python tools/benchmark/faults.py                                      # a few of each: minutes
    python tools/benchmark/faults.py --kills 100 --lines 40 --truncations 50 --flips 200 --inputs 300
    python tools/benchmark/faults.py --only kills lines --methods core SpCL
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from measuring import FOLDER, ROOT

PLACE = FOLDER / "faults"
METHODS = ("core", "SpCL", "ICE", "PPLR")
IMAGES = {
    "NAME": "synthetic",
    "ROOT": str(FOLDER / "images"),
    "TRAIN_IDENTITIES": 12,
    "TRAIN_IMAGES": 96,
    "TEST_IDENTITIES": 6,
    "QUERY_IMAGES": 12,
    "GALLERY_IMAGES": 36,
    "DISTRACTORS": 4,
    "JUNK": 2,
    "CAMERAS": 3,
    "DIFFICULTY": 0.2,
    "SIZE": [48, 24],
}
KEYS = {
    "DATASETS.TRAIN": IMAGES,
    "DATASETS.TESTS.synthetic": IMAGES,
    "INPUT.SIZE": [48, 24],
    "DATALOADER.WORKERS": 0,
    "DATALOADER.SAMPLER.BATCH_SIZE": 16,
    "DATALOADER.SAMPLER.NUM_INSTANCES": 4,
    "MODEL.BACKBONE.WIDTH": 8,
    "MODEL.DEVICE": "cpu",
    "PSEUDO_LABELS.K1": 8,
    "SOLVER.EPOCHS": 4,
    "SOLVER.ITERS_PER_EPOCH": 4,
    "SOLVER.AMP": "none",
    "TEST.PERIOD": 1,
    "LOG.WRITERS": ["text", "json"],
}
TIMEOUT = 300  # seconds after which a command counts as hanging


class Outcome(NamedTuple):
    """How one trial ended: `fault` is empty where all is as it should be."""

    trial: str
    case: str
    fault: str


class Ended(NamedTuple):
    """A command that has ended: its exit code (None = it hung and was killed) and what it said."""

    code: int | None
    text: str

    @property
    def refusal(self) -> str:
        """Why this is no clean refusal; empty if it is one."""
        if self.code is None:
            return f"hung for {TIMEOUT} s"
        if "Traceback" in self.text:
            return f"traceback: {self.text.strip().splitlines()[-1][:150]}"
        if self.code == 0:
            return "silent: it went on with exit code 0"
        return "" if self.code == 2 and "error: " in self.text else f"exit code {self.code}: {self.text[-150:]!r}"


# --- commands --------------------------------------------------------------------------------------------------------


def arguments_of(method: str, folder: Path, *more: str, processes: int = 1) -> list[str]:
    """The training command of a method on few images."""
    config = ROOT / ("configs/quickstart.yaml" if method == "core" else f"projects/{method}/configs/synthetic.yaml")
    keys = [f"{key}={json.dumps(value)}" for key, value in KEYS.items()]
    return [
        *(sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", str(config)),
        *(["--num-gpus", str(processes)] if processes > 1 else []),
        *(*keys, f"OUTPUT_DIR={folder}", *more),
    ]


def start(command: Sequence[str], limit: int | None = None, **keys: Any) -> subprocess.Popen[str]:
    """The command in a process group of its own; no file may grow beyond `limit` bytes."""

    def before() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=before,
        **keys,
    )


def wait(process: subprocess.Popen[str], seconds: float = TIMEOUT) -> Ended:
    """The end of a process; one that does not end is killed with its group."""
    try:
        text = process.communicate(timeout=seconds)[0]
        return Ended(process.returncode, text)
    except subprocess.TimeoutExpired:
        kill_group(process)
        return Ended(None, process.communicate()[0])


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(command: Sequence[str], **keys: Any) -> Ended:
    """Start and wait."""
    return wait(start(command, **keys))


def fresh(name: str) -> Path:
    """The path of a folder that is not there."""
    folder = PLACE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.unlink(missing_ok=True)
    return folder


# --- records ---------------------------------------------------------------------------------------------------------


def record_of(folder: Path) -> dict[str, Any]:
    """What must be equal in two runs: weights, the best file, metrics without times, names of all files."""
    from fastreid_uns.utils import checkpoint

    contents = {
        "last": checkpoint.load_checkpoint(checkpoint.last_checkpoint(folder)),
        "best": checkpoint.load_checkpoint(folder / checkpoint.BEST),
    }
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "lines": [{k: v for k, v in line.items() if not k.startswith("seconds")} for line in lines],
        "files": sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()),
        **{f"{name} epochs": content["epochs_done"] for name, content in contents.items()},
        **{f"{name} weights": content["model"] for name, content in contents.items()},
        **{f"{name} optimizer": content["optimizer"]["state"] for name, content in contents.items()},
    }


def difference(one: Any, two: Any, where: str = "") -> str:
    """The first place in which two records differ; empty if they are equal."""
    import torch

    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return "" if torch.equal(one, two) else f"{where} differ"
    if isinstance(one, list) and isinstance(two, list):
        one, two = dict(enumerate(one)), dict(enumerate(two))
    if isinstance(one, dict) and isinstance(two, dict):
        for key in [*one, *(key for key in two if key not in one)]:
            if key not in one or key not in two:
                return f"{where} {key} is in one only"
            if found := difference(one[key], two[key], f"{where} {key}".strip()):
                return found
        return ""
    return "" if one == two or (one != one and two != two) else f"{where}: {one!r} and {two!r}"


@cache
def straight(method: str, processes: int = 1) -> tuple[dict[str, Any], float, float]:
    """The record of a run without harm, the seconds until its first line, and those until its end.

    Raises:
        SystemExit: it fails, so that no trial would mean anything.
    """
    folder = fresh(f"straight-{method}-{processes}")
    began, first = time.perf_counter(), 0.0
    process = start(arguments_of(method, folder, processes=processes))
    while process.poll() is None and not first:
        time.sleep(0.05)
        if (folder / "metrics.jsonl").is_file():
            first = time.perf_counter() - began
    ended = wait(process)
    if ended.code != 0:
        raise SystemExit(f"faults: {method} without harm ended with {ended.code}: {ended.text[-2000:]}")
    return record_of(folder), first, time.perf_counter() - began


def goes_on(method: str, folder: Path, processes: int = 1) -> str:
    """Resume until the end; what is then different from a run without harm, or why it does not resume."""
    ended = run(arguments_of(method, folder, "--resume", processes=processes))
    if ended.code != 0:
        return f"--resume ended with {ended.code}: {ended.text.strip()[-200:]}"
    return difference(record_of(folder), straight(method, processes)[0])


# --- trials ----------------------------------------------------------------------------------------------------------


def kills(options: argparse.Namespace) -> Iterator[Outcome]:
    """SIGKILL at random moments, up to four times in the life of one run."""
    rng, left = random.Random(options.seed), options.kills
    of_one_run = max(1, min(4, options.kills // len(options.methods)))
    for number in range(3 * options.kills):  # a run that ends before its moment is made again
        if left <= 0:
            break
        method = options.methods[number % len(options.methods)]
        folder = fresh(f"kills-{method}")
        moments = killed_at(method, folder, min(of_one_run, left), rng)
        left -= len(moments)
        if moments:
            yield Outcome("kills", f"{method}, after {' s, '.join(moments)} s", goes_on(method, folder))


def killed_at(method: str, folder: Path, count: int, rng: random.Random) -> list[str]:
    """Start and resume a run, kill it each time; the seconds after which it was killed, fewer if it ended before."""
    _, first, whole = straight(method)
    moments: list[str] = []
    while len(moments) < count:
        process = start(arguments_of(method, folder, "--resume"))
        moment = rng.uniform(0.7 * first, whole)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=moment)
            break
        kill_group(process)
        process.communicate()
        moments.append(f"{moment:.2f}")
    return moments


TRACED = {  # where the record is written: file → its functions, None = all
    "utils/atomic.py": None,
    "utils/checkpoint.py": None,
    "engine/hooks.py": ("_save", "after_epoch"),
    "engine/log.py": ("epoch", "resume"),
}


def die_at_line(number: int) -> None:
    """SIGKILL this process before the line of that number, counted over those of `TRACED`; 0 only counts them.

    The count is the last line of stdout.
    """
    count = 0
    files = {str(ROOT / "fastreid_uns" / name): functions for name, functions in TRACED.items()}

    def line(frame: Any, event: str, _: Any) -> Callable[..., Any]:
        nonlocal count
        if event == "line":
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame: Any, event: str, _: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if code.co_filename not in files:
            return None
        functions = files[code.co_filename]
        return line if functions is None or code.co_name in functions else None

    import runpy

    sys.settrace(call)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.settrace(None)
        print(f"\n{count}")


def traced(command: Sequence[str], number: int) -> Ended:
    """A training command that kills itself at a line, see `die_at_line`."""
    python, program, *rest = command
    code = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(ROOT)]!r}; "
    code += f"sys.argv = [{program!r}, *sys.argv[1:]]; import faults; faults.die_at_line({number})"
    return run([python, "-c", code, *rest])


def lines(options: argparse.Namespace) -> Iterator[Outcome]:
    """SIGKILL at exact lines of what writes the record, spread evenly over the run."""
    share = -(-options.lines // len(options.methods))
    left = options.lines
    for method in options.methods:
        ended = traced(arguments_of(method, fresh("lines")), 0)
        if ended.code != 0:
            raise SystemExit(f"faults: {method} under trace ended with {ended.code}: {ended.text[-2000:]}")
        total = int(ended.text.split()[-1])
        for number in range(min(share, left)):
            line = round((number + 0.5) * total / share) + 1
            folder = fresh("lines")
            ended = traced(arguments_of(method, folder), line)
            fault = "" if ended.code == -signal.SIGKILL else f"it was not killed but ended with {ended.code}"
            yield Outcome("lines", f"{method}, line {line} of {total}", fault or goes_on(method, folder))
        left -= share


def damaged_load(file: Path) -> str:
    """Why a damaged checkpoint is not refused as one; empty if it is."""
    from fastreid_uns.errors import UserError
    from fastreid_uns.utils import checkpoint

    try:
        checkpoint.load_checkpoint(file)
    except UserError:
        return ""
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    return "silent: it loads"


def finished_run(method: str = "core") -> Path:
    straight(method)
    return PLACE / f"straight-{method}-1"


def truncations(options: argparse.Namespace) -> Iterator[Outcome]:
    """A checkpoint cut at random lengths; then the other files of the record, with a resumed command."""
    rng, folder = random.Random(options.seed), finished_run()
    whole = (folder / "best.pth").read_bytes()
    cut = PLACE / "cut.pth"
    for _ in range(options.truncations):
        length = rng.randrange(len(whole))
        cut.write_bytes(whole[:length])
        yield Outcome("truncations", f"checkpoint at {length:,} of {len(whole):,} bytes", damaged_load(cut))
    for name, share in (
        ("metrics.jsonl", 0.9),
        ("metrics.jsonl", 0.0),
        ("last", 0.0),
        ("last", 0.5),
        ("best.pth", 0.5),
    ):
        if not options.truncations:
            break
        copy = fresh("truncated")
        shutil.copytree(folder, copy)
        if name == "best.pth" and straight("core")[0]["best epochs"] != straight("core")[0]["last epochs"]:
            continue  # an earlier epoch, which the newest checkpoint does not hold
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(data[: int(share * len(data))])
        yield Outcome("truncations", f"{name} at {share:.0%}, resumed", goes_on("core", copy))


def flips(options: argparse.Namespace) -> Iterator[Outcome]:
    """One bit of a checkpoint at a random place."""
    rng, whole = random.Random(options.seed), (finished_run() / "best.pth").read_bytes()
    file = PLACE / "flipped.pth"
    for _ in range(options.flips):
        place = rng.randrange(8 * len(whole))
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        file.write_bytes(data)
        yield Outcome("flips", f"bit {place % 8} of byte {place // 8:,}", damaged_load(file))


def disk(options: argparse.Namespace) -> Iterator[Outcome]:
    """A folder that cannot be written, and files that may not grow, as on a full disk."""
    locked = PLACE / "locked"
    locked.mkdir(parents=True, exist_ok=True)
    locked.chmod(0o500)
    for folder in [Path("/proc/faults"), *([locked / "run"] if os.geteuid() else [])]:
        yield Outcome("disk", f"not writable: {folder.name}", run(arguments_of("core", folder)).refusal)
    size = (finished_run() / "best.pth").stat().st_size
    for limit in (1, 300, 2_000, 20_000, size // 2, size - 1):
        folder = fresh("full")
        ended = run(arguments_of("core", folder), limit=limit)
        yield Outcome("disk", f"full after {limit:,} bytes a file", ended.refusal or goes_on("core", folder))


def two(options: argparse.Namespace) -> Iterator[Outcome]:
    """Two commands in one folder at the same time: one trains, the other is refused."""
    folder = fresh("two")
    both = [start(arguments_of("core", folder)) for _ in range(2)]
    ends = sorted((wait(process) for process in both), key=lambda ended: ended.code or 0)
    fault = "" if ends[0].code == 0 else f"none went on: {ends[0].text[-200:]}"
    yield Outcome("two", "two processes in a folder: the one that trains", fault or goes_on("core", folder))
    yield Outcome("two", "two processes in a folder: the other one", ends[1].refusal)


def process_of_rank(folder: Path, rank: int) -> int | None:
    """The process that trains into a folder with that rank."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and str(folder) in (entry / "cmdline").read_text():
                variables = (entry / "environ").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in variables:
                    return int(entry.name)
    return None


def ranks(options: argparse.Namespace) -> Iterator[Outcome]:
    """One of two processes is killed, or stands still, after the first epoch."""
    for name, number in (("killed", signal.SIGKILL), ("frozen", signal.SIGSTOP)):
        for rank in (0, 1):
            folder = fresh("ranks")
            process = start(arguments_of("core", folder, "DISTRIBUTED.TIMEOUT_MINUTES=0.5", processes=2))
            while process.poll() is None and not (folder / "metrics.jsonl").is_file():
                time.sleep(0.05)
            victim = process_of_rank(folder, rank)
            if victim is not None:
                os.kill(victim, number)
            ended = wait(process)
            if victim is None:
                yield Outcome("ranks", f"rank {rank} {name}", f"it was not found: {ended.text[-150:]!r}")
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            named = ended.code not in (0, None) and "Traceback" not in ended.text and f"process {rank}" in ended.text
            fault = "" if named else ended.refusal or f"rank {rank} is not named: {ended.text[-150:]!r}"
            yield Outcome("ranks", f"rank {rank} {name}", fault or goes_on("core", folder, processes=2))


# --- wrong input -----------------------------------------------------------------------------------------------------


def flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Keys with dots → values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{where}.{key}".lstrip(".")
        found |= flat(value, path) if isinstance(value, dict) and value else {path: value}
    return found


def wrong_keys() -> Iterator[tuple[str, list[str]]]:
    """For each key of a config: a value of another kind, and a name that is nearly right."""
    import yaml

    config = yaml.safe_load((finished_run() / "config.yaml").read_text())
    wrong = {
        bool: ["perhaps", "[1]"],
        int: ["many", "[1]", "-7000"],
        float: ["much", "{a: 1}", ".nan"],
        str: ["no such thing"],
        list: ["5", "{a: 1}"],
        dict: ["5", "{a: 1}"],
    }
    free = ("SEED", "ROOT", "FOLDER", "DIR", "FILE", "OPTIMIZER_ARGS", "PLUGINS")  # take any text or number
    for key, value in flat(config).items():
        if key.startswith(("PAPER", "DATALOADER.SOURCE_SAMPLER")) or key.endswith(free):  # not read here
            continue
        for text in wrong.get(type(value), []):
            yield f"{key} {text}", [key, text]
        yield f"{key}X", [f"{key}X", "1"]
    for key in flat(config):
        if key.endswith(".NAME") and not key.startswith("PAPER"):
            yield f"{key} unknown", [key, "NoSuchThing"]


def wrong_files() -> Iterator[tuple[str, list[str]]]:
    """Files and folders that are not what they should be."""
    place = fresh("inputs")
    place.mkdir(parents=True)
    texts = {
        "empty.yaml": b"",
        "list.yaml": b"- 1\n- 2\n",
        "broken.yaml": b"SOLVER: {EPOCHS: 3\n",
        "binary.yaml": bytes(range(256)) * 4,
        "null.yaml": b"MODEL:\n",
        "base.yaml": b"_BASE_: 5\n",
        "circle.yaml": b"_BASE_: circle.yaml\n",
        "twice.yaml": b"SEED: 1\nSEED: 2\n",
        "plugin.yaml": b"PLUGINS: [no_such_plugin]\n",
        "file": b"a file",
        "lfs.pth": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "page.pth": b"<!DOCTYPE html><html></html>",
        "text.pth": b"weights\n",
        "nothing.pth": b"",
        "cut.pth": (finished_run() / "best.pth").read_bytes()[:20_000],
        "picture/a.jpg": b"\xff\xd8\xff and nothing more",
        "picture/b.jpg": b"no picture",
        "images/a.txt": b"no image",
        "table.csv": b"path,identity\nmissing.jpg,1\n",
        "header.csv": b"\x00\x01\x02",
    }
    for name, data in texts.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
    for name in [*(name for name in texts if name.endswith(".yaml")), "missing.yaml", "file", "images", "lfs.pth"]:
        if name not in ("empty.yaml",):
            yield f"config {name}", ["--config-file", str(place / name)]
    for name in ["lfs.pth", "page.pth", "text.pth", "nothing.pth", "cut.pth", "missing.pth", "images", "picture/a.jpg"]:
        yield f"weights {name}", ["MODEL.WEIGHTS", str(place / name)]
    for name in ["images", "picture", "missing", "file"]:
        yield f"folder {name}", ["DATASETS.TRAIN", f"{{NAME: folder, ROOT: {place / name}}}"]
    for name in ["table.csv", "header.csv", "missing.csv", "images"]:
        yield f"table {name}", ["DATASETS.TRAIN", f"{{NAME: csv_file, FILE: {place / name}}}"]
    for name in ["file", "file/run"]:
        yield f"output {name}", [f"OUTPUT_DIR={place / name}"]
    yield "output of another run", [f"OUTPUT_DIR={finished_run()}"]
    yield "another config resumed", ["--resume", f"OUTPUT_DIR={finished_run()}", "SOLVER.BASE_LR", "0.5"]
    yield "fewer epochs resumed", ["--resume", f"OUTPUT_DIR={finished_run()}", "SOLVER.EPOCHS", "1"]
    yield "nothing to evaluate", ["--eval-only"]
    for flags in (
        ["--no-such-flag"],
        ["--num-gpus", "0"],
        ["--num-gpus", "two"],
        ["SOLVER.EPOCHS"],
        ["=", "="],
        ["--config-file"],
    ):
        yield f"arguments {' '.join(flags)}", flags


def inputs(options: argparse.Namespace) -> Iterator[Outcome]:
    """Wrong input on the command line; a random choice of all that are known."""
    if not options.inputs:
        return
    known = [*wrong_files(), *wrong_keys()]
    chosen = random.Random(options.seed).sample(known, min(options.inputs, len(known)))
    for name, arguments in chosen:
        ended = run([*arguments_of("core", fresh("wrong")), *arguments])
        yield Outcome("inputs", name, ended.refusal)


TRIALS: dict[str, Callable[[argparse.Namespace], Iterator[Outcome]]] = {
    "kills": kills,
    "lines": lines,
    "truncations": truncations,
    "flips": flips,
    "inputs": inputs,
    "disk": disk,
    "two": two,
    "ranks": ranks,
}


def table(outcomes: Sequence[Outcome]) -> str:
    """Trials, how many were made, and what went wrong."""
    from tabulate import tabulate

    rows = []
    for trial in dict.fromkeys(outcome.trial for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.trial == trial]
        text = (TRIALS[trial].__doc__ or "").strip().rstrip(".")
        rows.append([trial, text, len(own), sum(bool(outcome.fault) for outcome in own)])
    return tabulate(rows, ["trial", "what is done", "cases", "faults"], tablefmt="github")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("kills", 4), ("lines", 4), ("truncations", 10), ("flips", 20), ("inputs", 10)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"cases, {default} by default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of kills and lines")
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), help="trials, all by default")
    parser.add_argument("--seed", type=int, default=1, help="of moments, places and choices")
    parser.add_argument("--output", type=Path, default=FOLDER / "faults.json", help="where the outcomes go")
    return parser.parse_args()


def main() -> int:
    """0 if every trial ended as it should."""
    import torch

    from fastreid_uns.utils.environment import environment

    options = parse()
    PLACE.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    for name in options.only:
        for outcome in TRIALS[name](options):
            outcomes.append(outcome)
            print(f"{outcome.trial}: {outcome.case}: {outcome.fault or 'as it should be'}", flush=True)
            record = {"environment": environment(torch.device("cpu")), "outcomes": [o._asdict() for o in outcomes]}
            options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(outcomes))
    return int(any(outcome.fault for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
