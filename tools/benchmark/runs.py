"""Whole training runs on generated sets as large as the published ones: seconds of each stage, images a second, scores.

A case is `core` or the folder of a project, whose `configs/market.yaml` is taken, from random weights. On the CPU one
and two processes of one thread each train the same network on a small set, which tells how well two processes scale.
The metrics of each epoch of the large sets stand in `metrics/`, a trace of one step of the core in `profiles/`, with a
table of its operations.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import measuring
from measuring import FOLDER, ROOT

SETS = {
    "market1501": {
        "TRAIN_IDENTITIES": 751,
        "TRAIN_IMAGES": 12936,
        "TEST_IDENTITIES": 750,
        "QUERY_IMAGES": 3368,
        "GALLERY_IMAGES": 15913,
        "DISTRACTORS": 2798,
        "JUNK": 3819,
        "CAMERAS": 6,
    },
    "msmt17": {
        "TRAIN_IDENTITIES": 1041,
        "TRAIN_IMAGES": 32621,
        "TEST_IDENTITIES": 3060,
        "QUERY_IMAGES": 11659,
        "GALLERY_IMAGES": 82161,
        "DISTRACTORS": 0,
        "JUNK": 0,
        "CAMERAS": 15,
    },
    "medium": {"TRAIN_IDENTITIES": 120, "TRAIN_IMAGES": 2048},
    "small": {"TRAIN_IDENTITIES": 12, "TRAIN_IMAGES": 96, "TEST_IDENTITIES": 6, "QUERY_IMAGES": 12},
}
KEYS = {
    "market1501": {},
    "msmt17": {"SOLVER.ITERS_PER_EPOCH": 400},
    "medium": {"INPUT.SIZE": [128, 64], "MODEL.BACKBONE.MODEL": "resnet18", "SOLVER.ITERS_PER_EPOCH": 20},
    "small": {"INPUT.SIZE": [32, 16], "MODEL.BACKBONE.MODEL": "resnet18", "SOLVER.ITERS_PER_EPOCH": 2},
}
SMALLER = {  # on a CPU
    "DATALOADER.SAMPLER.BATCH_SIZE": 64,
    "DATALOADER.WORKERS": 2,
    "MODEL.GHOST_BATCH": 32,
    "PSEUDO_LABELS.MIN_SAMPLES": 2,
}
PROJECTS = sorted(path.parents[1].name for path in ROOT.glob("projects/*/configs/market.yaml"))


def cases(size: str) -> list[measuring.Case]:
    if size == "small":
        return [case("core", "small", "cpu", epochs=2, processes=count) for count in (1, 2)]
    found = [case("core", "medium", "cpu", epochs=4, processes=count) for count in (1, 2)]
    found += [case("core", name, "cuda", epochs=60) for name in ("market1501", "msmt17")]
    return found + [of_project(project, "cuda") for project in PROJECTS]


def case(run: str, images: str, device: str, *, epochs: int, processes: int = 1, **more: Any) -> measuring.Case:
    return {"run": run, "set": images, "device": device, "epochs": epochs, "processes": processes, **more}


def of_project(project: str, device: str) -> measuring.Case:
    """Two short epochs: their steps are alike, and stages before them take as long as in whole ones."""
    return case(project, "market1501", device, epochs=2, iterations=40)


def measure(
    run: str,
    set: str,
    device: str,
    epochs: int,
    processes: int,
    compile: bool = False,
    period: int = 0,
    iterations: int = 0,
) -> dict[str, Any]:
    """Wall seconds of the command, seconds of each stage over all epochs, and the numbers of the last epoch.

    Args:
        compile: compile the encoders.
        period: epochs from one evaluation to the next, 0 = one after the last epoch.
        iterations: steps of an epoch, 0 = as many as the config has.
    """
    import yaml

    from fastreid_uns.registry import DATASET_REGISTRY

    config = ROOT / ("configs/base.yaml" if run == "core" else f"projects/{run}/configs/market.yaml")
    images = {"NAME": "synthetic", "ROOT": str(FOLDER / "images"), "SIZE": [128, 64], **SETS[set]}
    output = FOLDER / "-".join(["run", run, set, device, str(processes)])
    keys = {
        "DATASETS.TRAIN": images,
        "DATASETS.TESTS.market1501": None,
        "DATASETS.TESTS.generated": images,
        "MODEL.DEVICE": device,
        "MODEL.WEIGHTS": "",
        "SOLVER.EPOCHS": epochs,
        "TEST.PERIOD": period,
        "SOLVER.COMPILE": compile,
        "LOG.WRITERS": ["json"],
        "CHECKPOINT.PERIOD": 0,
        "OUTPUT_DIR": str(output),
        **KEYS[set],
        **(SMALLER if device == "cpu" else {"DATALOADER.WORKERS": os.cpu_count()}),
        **({"INPUT.CAMERA_STYLE.KIND": "colors"} if run == "TMP" else {}),
        **({"SOLVER.ITERS_PER_EPOCH": iterations} if iterations else {}),
    }
    __import__("fastreid_uns.builtin")
    DATASET_REGISTRY.build(images)  # rendered once, outside of the time
    shutil.rmtree(output, ignore_errors=True)
    start = time.perf_counter()
    train(config, keys, processes)
    seconds = time.perf_counter() - start
    if run == "core" and processes == 1 and set != "small" and not compile:
        folder = f"tools/benchmark/profiles/{set}_{device}"
        profile = {"NAME": "ProfileHook", "ACTIVE": 1, "FOLDER": folder}
        short = {"SOLVER.EPOCHS": 1, "SOLVER.ITERS_PER_EPOCH": 10, "OUTPUT_DIR": f"{output}-profile"}
        train(config, {**keys, **short, "HOOKS.profile": profile}, processes)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    if set in ("market1501", "msmt17"):
        kept = ROOT / f"tools/benchmark/metrics/{output.name}.jsonl"
        kept.parent.mkdir(exist_ok=True)
        shutil.copy(output / "metrics.jsonl", kept)
    cfg = yaml.safe_load((output / "config.yaml").read_text())
    return {"seconds": seconds, **summary(lines, cfg["DATALOADER"]["SAMPLER"]["BATCH_SIZE"], cfg["SOLVER"])}


def train(config: Path, keys: dict[str, Any], processes: int) -> None:
    """The command as a user gives it.

    Raises:
        SystemExit: it failed.
    """
    threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"} if keys["MODEL.DEVICE"] == "cpu" else {}
    command = [sys.executable, "tools/train_net.py", "--config-file", str(config), "--num-gpus", str(processes)]
    command += [f"{key}={json.dumps(value)}" for key, value in keys.items()]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **threads}, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(f"runs: {config} ended with {done.returncode}; its message stands above.")


def summary(lines: list[dict[str, Any]], batch: int, solver: dict[str, Any]) -> dict[str, Any]:
    """Stages in seconds over the run, the median epoch after the first, images a second in it, and the last scores."""
    stages: dict[str, float] = defaultdict(float)
    for line in lines:
        for name, value in line.items():
            if name.startswith("seconds_") and name != "seconds_epoch":
                stages[name.removeprefix("seconds_")] += value
    later = lines[1:] or lines
    train = statistics.median(line["seconds_train"] for line in later)
    last = {name: value for name, value in lines[-1].items() if name.endswith(("mAP", "rank1")) or name == "clusters"}
    evaluations = [round(line["seconds_evaluate"], 2) for line in lines if "seconds_evaluate" in line]
    return {
        **({"evaluations": evaluations} if len(evaluations) > 1 else {}),
        "stages": {name: round(value, 2) for name, value in stages.items()},
        "epoch_seconds": statistics.median(line["seconds_epoch"] for line in later),
        "images_per_second": batch * solver["ITERS_PER_EPOCH"] / train,
        "last": last,
    }


if __name__ == "__main__":
    measuring.main(__doc__, __file__, cases, measure)
