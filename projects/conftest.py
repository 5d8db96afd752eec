"""What the tests of the projects share: one copy of each project, and the long cases of a method as a whole."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.recluster import ReclusterHook
from fastreid_uns.utils import checkpoint

ROOT = Path(__file__).parent

for _file in ROOT.glob("*/__init__.py"):  # pytest would import a package under other names as well
    _name = _file.parent.name
    sys.modules[_name] = sys.modules[f"projects.{_name}"] = importlib.import_module(f"fastreid_uns.projects.{_name}")


def differing(one: Any, two: Any, name: str = "") -> list[str]:
    """Names of the leaves in which two nested states differ."""
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        one, two = dict(enumerate(one)), dict(enumerate(two))
    if isinstance(one, dict) and isinstance(two, dict):
        keys = one.keys() | two.keys()
        return [leaf for key in keys for leaf in differing(one.get(key), two.get(key), f"{name}.{key}")]
    same = torch.equal(one, two) if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) else one == two
    return [] if same else [name]


def losses(trainer: DefaultTrainer) -> list[float]:
    lines = (trainer.folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def seeded_tensors(names: Sequence[str], seed: int) -> dict[str, Tensor]:
    """The tensors of a golden file that stores only names and shapes, such as "norm.weight 48" or "count scalar"."""
    tensors = {}
    for place, entry in enumerate(sorted(names)):
        name, _, shape = entry.partition(" ")
        sides = () if shape == "scalar" else tuple(map(int, shape.split("x")))
        values = torch.tensor(np.random.RandomState(seed + place).standard_normal(sides), dtype=torch.float32)
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(0)
        elif name.endswith("running_var"):
            tensors[name] = 1 + 0.1 * values.abs()
        else:
            tensors[name] = 1 + 0.1 * values if len(sides) == 1 and name.endswith("weight") else 0.05 * values
    return tensors


@pytest.fixture(name="seeded_tensors")
def seeded_tensors_for_tests() -> Callable[[Sequence[str], int], dict[str, Tensor]]:
    return seeded_tensors


@pytest.fixture
def read_golden(request) -> Callable[[str], tuple[dict[str, Any], dict[str, Tensor], Tensor]]:
    """Reads a file beside the test: its content, the weights of `in_keys`, and the normalised images that went in."""

    def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
        with np.load(request.path.parent / "golden" / f"{name}.npz") as file:
            content = {key: file[key] if file[key].ndim else file[key].item() for key in file.files}
        seed, shape = content["par_seed"], (content["par_batch"], 3, *content["par_size"])
        images = torch.tensor(np.random.RandomState(seed + 90000).standard_normal(shape), dtype=torch.float32)
        return content, seeded_tensors(content["in_keys"], seed), images

    return read


@pytest.fixture
def small_run(shrink, learning_set, tmp_path) -> Callable[..., list[str]]:
    """Overrides that make a run of a project's config small enough to be repeated, and still learn."""

    def overrides(config: Path, **more: object) -> list[str]:
        keys = {"SOLVER__BASE_LR": 0.002, "SOLVER__EPOCHS": 6, "SOLVER__ITERS_PER_EPOCH": 20}
        keys |= {"MODEL__BACKBONE__WIDTH": 16, "OUTPUT_DIR": str(tmp_path / "run")}
        return shrink(config, learning_set, 32, **{**keys, **more})

    return overrides


@pytest.fixture
def assert_it_learns(small_run, tmp_path) -> Callable[[str], None]:
    """A run of a config below projects/ raises mAP, and is the same run if it is resumed from its middle."""

    def check(name: str, epochs: int = 6) -> None:
        config, half = ROOT / name, tmp_path / "half"
        keys = {"CHECKPOINT__KEEP": epochs, "SOLVER__EPOCHS": epochs}
        cfg = load_config(config, small_run(config, **keys))
        straight = DefaultTrainer(cfg)
        before = DefaultTrainer.test(cfg, straight.model)["synthetic"]["mAP"]
        straight.train()
        assert losses(straight)[-1] < losses(straight)[0]
        assert straight.results["synthetic"]["mAP"] > before + 5

        half.mkdir()
        middle = f"checkpoint_{epochs // 2:04d}.pth"
        shutil.copy(straight.folder / middle, half)
        checkpoint.point_to_last(half / middle)
        torch.rand(5)
        resumed = DefaultTrainer(load_config(config, small_run(config, **keys, OUTPUT_DIR=str(half))))
        resumed.resume()
        resumed.train()
        assert differing(resumed.state_dict(), straight.state_dict()) == []
        assert resumed.results == straight.results
        assert losses(resumed) == losses(straight)

    return check


@pytest.fixture
def assert_processes_agree(small_run, launch, tmp_path) -> Callable[[str], None]:
    """Two processes train a config below projects/ to equal weights, and to those of one but for rounding."""

    def check(name: str) -> None:
        config = ROOT / name
        plain = {"MODEL__GHOST_BATCH": 16, "SOLVER__OPTIMIZER": "SGD"}
        small_steps = {"SOLVER__BASE_LR": 0.0003, "SOLVER__EPOCHS": 2, "SOLVER__ITERS_PER_EPOCH": 3}  # of rounding
        short = small_run(config, **plain, **small_steps)
        one, two = launch(2, tmp_path / "two", short, config)
        assert differing(one, two) == []
        single = DefaultTrainer(load_config(config, short))
        single.train()
        assert torch.equal(single.hook(ReclusterHook).pseudo.labels, one["labels"])
        for name, value in single.model.state_dict().items():
            torch.testing.assert_close(
                one["model"][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name} {m}"
            )

    return check
