"""What becomes of a run that is killed, of files that are damaged, and of wrong input: a trial by force.

Each trial does harm to a training command on a few generated images, then goes on with `--resume`, and compares the
record of the run (weights, metrics without times, best file, names of all files) with that of a run without harm. Wrong
input must end with exit code 2 and a message, never with a traceback, and never with 0.

    python tools/benchmark/faults.py                                      # a few of each: minutes
    python tools/benchmark/faults.py --kills 100 --interrupts 20 --lines 40 --truncations 50 --flips 200 --inputs 300
    python tools/benchmark/faults.py --only kills lines --methods core SpCL
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fault_commands import EPOCHS, PLACE, STRUCK, THREADS, Command, Ended, arguments_of, run, warm_up
from fault_inputs import wrong_files, wrong_keys
from measuring import FOLDER, ROOT

METHODS = ("core", "SpCL", "ICE", "PPLR")
COUNTS = {"kills": 4, "interrupts": 4, "lines": 4, "truncations": 10, "flips": 20, "inputs": 10}  # cases by default


SIGNALS = (signal.SIGINT, signal.SIGTERM)
LIMIT = 5.0  # seconds from a signal to the end of a command
GROUPED = (str(ROOT / "fastreid_uns/__main__.py"),)
STAGES = {
    "decoding": "fastreid_uns.data.image_set:_Decoder.__getitem__",
    "extraction": "fastreid_uns.evaluation.extract:_forward_all",
    "labels": "fastreid_uns.pseudo_labels.dbscan:_clusters",
    "training step": "fastreid_uns.engine.trainer:Trainer._backward",
    "evaluation": "fastreid_uns.evaluation.evaluator:Evaluator.score",
    "checkpoint": "fastreid_uns.utils.checkpoint:_seal",
    "best checkpoint": "fastreid_uns.utils.checkpoint:copy_checkpoint",
    "line of the epoch": "fastreid_uns.engine.log:JsonWriter.epoch",
}
STAGES_OF_PHOTOS = {
    "look through the folder": "fastreid_uns.photos.road:read_album",
    "features": "fastreid_uns.photos.road:embed",
    "groups": "fastreid_uns.photos.road:cluster",
    "report": "fastreid_uns.photos.road:write_report",
}


class Outcome(NamedTuple):
    """How one trial ended: `fault` is empty where all is as it should be."""

    trial: str
    case: str
    fault: str


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


class Straight(NamedTuple):
    """A run without harm: its record, the seconds until its first line, and those of an epoch after it."""

    record: dict[str, Any]
    first: float
    epoch: float


@cache
def straight(method: str, processes: int = 1) -> Straight:
    """The run without harm of a method.

    Raises:
        SystemExit: it fails, so that no trial would mean anything.
    """
    folder = fresh(f"straight-{method}-{processes}")
    began, first = time.perf_counter(), 0.0
    command = Command(arguments_of(method, folder, processes=processes), cold=processes > 1)
    while command.runs() and not first:
        time.sleep(0.01)
        if lines_in(folder):
            first = time.perf_counter() - began
    ended = command.wait()
    if ended.code != 0:
        raise SystemExit(f"faults: {method} without harm ended with {ended.code}: {ended.text[-2000:]}")
    return Straight(record_of(folder), first, (time.perf_counter() - began - first) / EPOCHS)


def lines_in(folder: Path) -> int:
    """How many epochs a run has written down."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def goes_on(method: str, folder: Path, processes: int = 1) -> str:
    """Resume until the end; what is then different from a run without harm, or why it does not resume."""
    ended = run(arguments_of(method, folder, "--resume", processes=processes), cold=processes > 1)
    if ended.code != 0:
        return f"--resume ended with {ended.code}: {ended.text.strip()[-200:]}"
    return difference(record_of(folder), straight(method, processes).record)


# --- trials ----------------------------------------------------------------------------------------------------------


def kills(options: argparse.Namespace) -> Iterator[Outcome]:
    """SIGKILL at random moments, up to four times in the life of one run."""
    rng, left, number = random.Random(options.seed), options.kills, 0
    of_one_run = max(1, min(4, options.kills // len(options.methods)))
    while left > 0 and number < 3 * options.kills:  # a run that ends before all its moments is followed by another one
        method = options.methods[number % len(options.methods)]
        number += 1
        folder = fresh(f"kills-{method}")
        moments = killed_at(method, folder, min(of_one_run, left), rng)
        left -= len(moments)
        if moments:
            fault = goes_on(method, folder)
            for moment in moments:
                yield Outcome("kills", f"{method}, killed in epoch {moment}", fault)


def killed_at(method: str, folder: Path, count: int, rng: random.Random) -> list[str]:
    """Start and resume a run, and kill it each time at a random place between its start and its end.

    Returns:
        The places, in epochs; fewer than `count` if it ended before.
    """
    places = sorted(rng.uniform(0, EPOCHS + 0.2) for _ in range(count))
    return [f"{place:.2f}" for place in places if struck(method, folder, place, signal.SIGKILL)]


def struck(method: str, folder: Path, place: float, number: signal.Signals) -> Ended | None:
    """How a run ends that is started or resumed, and sent a signal when it is `place` epochs far.

    Returns:
        None if it ended before.
    """
    began, usual = time.perf_counter(), straight(method)
    command = Command(arguments_of(method, folder, "--resume"))
    while command.runs() and lines_in(folder) < int(place):
        time.sleep(0.002)
    here = time.perf_counter()
    starts = lines_in(folder) == 0 or here - began < 0.1  # it imports and reads first
    until = here + place % 1 * (usual.first if starts else usual.epoch)
    while command.runs() and time.perf_counter() < until:
        time.sleep(0.002)
    sent = command.runs()
    if sent:
        os.kill(command.pid, number)
    ended = command.wait()
    return ended if sent else None


def stages(options: argparse.Namespace) -> Iterator[Outcome]:
    """Ctrl-C and SIGTERM in each stage of training and of photo grouping, to two processes, and to the review page."""
    for number in SIGNALS:
        for stage, place in STAGES.items():
            folder = fresh("stages")
            ended, seconds = struck_in(arguments_of("core", folder), place, number)
            fault = unheard(ended, seconds, number) or goes_on("core", folder)
            yield Outcome("stages", f"{stage}, {number.name}, {seconds:.1f} s", fault)
        folder = fresh("stages")
        command = Command(arguments_of("core", folder, processes=2), cold=True)
        while command.runs() and not lines_in(folder):
            time.sleep(0.05)
        ended, seconds = told(command, number, group=number == signal.SIGINT)
        fault = unheard(ended, seconds, number) or goes_on("core", folder, processes=2)
        yield Outcome("stages", f"two processes, {number.name}, {seconds:.1f} s", fault)
        words = grouping(fresh("stages"))
        for stage, place in STAGES_OF_PHOTOS.items():
            ended, seconds = struck_in(words, place, number)
            again = run(words)
            fault = unheard(ended, seconds, number) or ("" if again.code == 0 else f"again: {again.text[-200:]}")
            yield Outcome("stages", f"group: {stage}, {number.name}, {seconds:.1f} s", fault)
            shutil.rmtree(PLACE / "stages")
        run(words)
        command = Command([*GROUPED, "review", str(PLACE / "stages"), "--no-browser"], cold=True)
        command.wait_for("Ctrl-C ends")
        ended, seconds = told(command, number)
        usual = ended.code == 0 and "Traceback" not in ended.text  # Ctrl-C is how one leaves the page
        fault = "" if number == signal.SIGINT and usual else unheard(ended, seconds, number)
        yield Outcome("stages", f"review page, {number.name}, {seconds:.1f} s", fault)


def grouping(output: Path) -> list[str]:
    """The command that groups a few generated pictures without training, by a network of random numbers."""
    import numpy as np
    from PIL import Image

    photos, network = PLACE / "photos", PLACE / "network.yaml"
    network.write_text("MODEL: {WEIGHTS: '', BACKBONE: {NAME: timm, MODEL: tf_efficientnet_lite0}}\n")
    photos.mkdir(exist_ok=True)
    for number in range(12):
        pattern = np.kron(np.random.default_rng(number % 3).integers(0, 256, (4, 4, 3)), np.ones((8, 8, 1)))
        Image.fromarray((0.9 * pattern + number).astype(np.uint8)).save(photos / f"{number}.png")
    wishes = ["--size", "32", "32", "--no-training", "--no-questions", "--config-file", str(network)]
    return [*GROUPED, "group", str(photos), "--output", str(output), *wishes]


def struck_in(words: Sequence[str], place: str, number: signal.Signals) -> tuple[Ended, float]:
    """How a command ends that gets a signal in a function, and the seconds until then."""
    STRUCK.unlink(missing_ok=True)
    ended = Command(words, struck=(place, number)).wait()
    return ended, time.monotonic() - float(STRUCK.read_text()) if STRUCK.exists() else float("nan")


def told(command: Command, number: signal.Signals, *, group: bool = False) -> tuple[Ended, float]:
    """How a command ends that is sent a signal, its children as well if `group`, and the seconds until then."""
    began = time.monotonic()
    (os.killpg if group else os.kill)(command.pid, number)
    return command.wait(), time.monotonic() - began


def unheard(ended: Ended, seconds: float, number: signal.Signals) -> str:
    """Why this is not how a command ends at a signal; empty if it is."""
    if seconds != seconds:
        return f"it was never there: {ended.code}: {ended.text[-300:]!r}"
    if seconds > LIMIT:
        return f"it took {seconds:.1f} s"
    right = ended.code == 128 + number and ended.text.count("stopped: ") == 1 and "Traceback" not in ended.text
    return "" if right else f"{ended.code}: {ended.text[-1000:]!r}"


def interrupts(options: argparse.Namespace) -> Iterator[Outcome]:
    """Ctrl-C and SIGTERM at random moments: one line that says how to go on, and the exit code of the signal."""
    rng = random.Random(options.seed)
    for case in range(options.interrupts):
        method = options.methods[case % len(options.methods)]
        number = (signal.SIGINT, signal.SIGTERM)[case // len(options.methods) % 2]
        folder, place = fresh("interrupts"), rng.uniform(0, EPOCHS)
        ended = struck(method, folder, place, number)
        if ended is None:
            continue
        told = ended.text.count("stopped: ") == 1 and "Traceback" not in ended.text
        outside = ended.code == -number and (not folder.exists() or lines_in(folder) == EPOCHS)  # before, or done
        fault = "" if outside or (told and ended.code == 128 + number) else f"{ended.code}: {ended.text[-1000:]!r}"
        yield Outcome("interrupts", f"{method}, {number.name} in epoch {place:.2f}", fault or goes_on(method, folder))


def lines(options: argparse.Namespace) -> Iterator[Outcome]:
    """SIGKILL at exact lines of what writes the record, spread evenly over the run."""
    share = -(-options.lines // len(options.methods))
    left = options.lines
    for method in options.methods:
        if left <= 0:
            break
        ended = run(arguments_of(method, fresh("lines")), line=0)
        if ended.code != 0:
            raise SystemExit(f"faults: {method} under trace ended with {ended.code}: {ended.text[-2000:]}")
        total = int(ended.text.split()[-1])
        for number in range(min(share, left)):
            line = round((number + 0.5) * total / share) + 1
            folder = fresh("lines")
            ended = run(arguments_of(method, folder), line=line)
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
        if name == "best.pth" and straight("core").record["best epochs"] != straight("core").record["last epochs"]:
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
    """A folder that cannot be written, files that may not grow, and a disk that is full at once or on the way."""
    for place in ("/proc/faults", "/dev/null/run"):
        yield Outcome("disk", f"not writable: {place}", run(arguments_of("core", Path(place))).refusal)
    size = (finished_run() / "best.pth").stat().st_size
    for limit in (1, 300, 2_000, 20_000, size // 2, size - 1):
        folder = fresh("full")
        ended = run(arguments_of("core", folder), limit=limit)
        yield Outcome("disk", f"full after {limit:,} bytes a file", ended.refusal or goes_on("core", folder))
    for kilobytes in (4, 16, size // 1024):
        with small_disk(kilobytes) as folder:
            if folder is None:  # only root may mount one
                return
            ended = run(arguments_of("core", folder / "run"))
            mount("-o", f"remount,size={16 * size}", folder)
            fault = ended.refusal or goes_on("core", folder / "run")
            yield Outcome("disk", f"a disk of {kilobytes:,} kB", fault)
    with small_disk(16 * size // 1024) as folder:
        command = Command(arguments_of("core", folder / "run"))
        while command.runs() and not lines_in(folder / "run"):
            time.sleep(0.005)
        with contextlib.suppress(OSError), (folder / "other").open("wb") as stream:
            while True:
                stream.write(bytes(4096))
                stream.flush()
        ended = command.wait()
        (folder / "other").unlink()
        yield Outcome("disk", "filled up in the second epoch", ended.refusal or goes_on("core", folder / "run"))
        mount("-o", "remount,ro", folder)
        ended = run(arguments_of("core", folder / "other"))
        yield Outcome("disk", "a disk that is read-only", ended.refusal)


def mount(*words: str | Path) -> bool:
    """Whether `mount` has done it."""
    return subprocess.run(["mount", *map(str, words)], capture_output=True).returncode == 0


@contextlib.contextmanager
def small_disk(kilobytes: int) -> Iterator[Path | None]:
    """The folder of a disk in memory of that size; None where none may be mounted."""
    folder = PLACE / "disk"
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() or not mount("-t", "tmpfs", "-o", f"size={kilobytes}k", "faults", folder):
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def two(options: argparse.Namespace) -> Iterator[Outcome]:
    """Two commands in one folder at the same time: one trains, the other is refused."""
    folder = fresh("two")
    both = [Command(arguments_of("core", folder)) for _ in range(2)]
    ends = sorted((command.wait() for command in both), key=lambda ended: ended.code or 0)
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
            words = arguments_of("core", folder, "DISTRIBUTED.TIMEOUT_MINUTES=0.5", processes=2)
            command = Command(words, cold=True)
            while command.runs() and not lines_in(folder):
                time.sleep(0.05)
            victim = process_of_rank(folder, rank)
            if victim is not None:
                os.kill(victim, number)
            ended = command.wait()
            if victim is None:
                yield Outcome("ranks", f"rank {rank} {name}", f"it was not found: {ended.text[-150:]!r}")
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
            named = ended.code not in (0, None) and "Traceback" not in ended.text and f"process {rank}" in ended.text
            fault = "" if named else ended.refusal or f"rank {rank} is not named: {ended.text[-150:]!r}"
            yield Outcome("ranks", f"rank {rank} {name}", fault or goes_on("core", folder, processes=2))


def inputs(options: argparse.Namespace) -> Iterator[Outcome]:
    """Wrong input on the command line; a random choice of all that are known."""
    if not options.inputs:
        return
    run_folder = finished_run()
    place = fresh("inputs")
    known = [*wrong_files(place, run_folder), *wrong_keys(run_folder / "config.yaml")]
    chosen = random.Random(options.seed).sample(known, min(options.inputs, len(known)))
    for name, arguments in chosen:
        ended = run([*arguments_of("core", fresh("wrong")), *arguments])
        yield Outcome("inputs", name, ended.refusal)


TRIALS: dict[str, Callable[[argparse.Namespace], Iterator[Outcome]]] = {
    "kills": kills,
    "stages": stages,
    "interrupts": interrupts,
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
    for name, default in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"cases, {default} by default")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), help="of kills, interrupts and lines"
    )
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS), help="trials, all by default")
    parser.add_argument("--seed", type=int, default=1, help="of moments, places and choices")
    parser.add_argument("--output", type=Path, default=FOLDER / "faults.json", help="where the outcomes go")
    return parser.parse_args()


def main() -> int:
    """0 if every trial ended as it should."""
    options = parse()
    import torch

    from fastreid_uns.utils.environment import environment

    PLACE.mkdir(parents=True, exist_ok=True)
    warm_up()
    machine = environment(torch.device("cpu"))
    outcomes: list[Outcome] = []
    for name in options.only:
        for outcome in TRIALS[name](options):
            outcomes.append(outcome)
            print(f"{outcome.trial}: {outcome.case}: {outcome.fault or 'as it should be'}", flush=True)
            record = {"environment": machine, "outcomes": [o._asdict() for o in outcomes]}
            options.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(outcomes))
    return int(any(outcome.fault for outcome in outcomes))


if __name__ == "__main__":
    os.environ.update(THREADS)
    sys.exit(main())
