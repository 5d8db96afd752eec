"""Each project on the generated set: it learns, resumes, and does not mind how many processes there are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.recluster import ReclusterHook
from fastreid_uns.utils import checkpoint

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(ROOT.glob("projects/*/configs/synthetic*.yaml"))
EPOCHS = 6


@pytest.fixture(params=CONFIGS, ids=lambda path: f"{path.parents[1].name}-{path.stem}")
def config(request) -> Path:
    return request.param


@pytest.fixture
def recipe(config, tiny, tiny_set, tmp_path) -> list[str]:
    """Overrides that leave the method as it is and make everything around it small."""
    section = {
        **tiny_set,
        "TRAIN_IDENTITIES": 24,
        "TRAIN_IMAGES": 288,
        "TEST_IDENTITIES": 16,
        "QUERY_IMAGES": 32,
        "GALLERY_IMAGES": 160,
        "DISTRACTORS": 20,
        "DIFFICULTY": 0.4,
        "CAMERA_BIAS": 0.3,
        "SIZE": [48, 24],
    }
    values = {
        "DATASETS.TRAIN": section,
        "DATASETS.TESTS.synthetic": section,
        "INPUT.SIZE": [48, 24],
        "DATALOADER.SAMPLER.BATCH_SIZE": 32,
        "MODEL.BACKBONE.WIDTH": 16,
        "SOLVER.BASE_LR": 0.002,
        "SOLVER.EPOCHS": EPOCHS,
        "SOLVER.ITERS_PER_EPOCH": 20,
        "TEST.PERIOD": 0,
        "OUTPUT_DIR": str(tmp_path / "run"),
    }
    cfg = load_config(config)
    for name, source in cfg.DATASETS.SOURCES.items():
        values[f"DATASETS.SOURCES.{name}"] = {**section, "SEED": source.SEED}
        values["DATALOADER.SOURCE_SAMPLER.BATCH_SIZE"] = 32
    if "CLUSTERS" in cfg.DATALOADER.SAMPLER:
        values["DATALOADER.SAMPLER.CLUSTERS"] = (
            cfg.DATALOADER.SAMPLER.CLUSTERS * 32 // cfg.DATALOADER.SAMPLER.BATCH_SIZE
        )
    for name in cfg.INPUT.AUGMENTS:
        values |= {f"INPUT.AUGMENTS.{name}.PAD": 2, f"INPUT.AUGMENTS.{name}.ERASE": 0.0}
    few_images = {"K1": 12, "K2": 3, "MIN_SAMPLES": 2}
    values |= {f"PSEUDO_LABELS.{key}": value for key, value in few_images.items() if key in cfg.PSEUDO_LABELS}
    kept = ("DATALOADER.WORKERS", "MODEL.DEVICE", "SOLVER.AMP", "LOG.WRITERS")
    return [
        *(value for value in tiny if value.startswith(kept)),
        *(f"{key}={yaml.safe_dump(value, default_flow_style=True, width=10**6)}" for key, value in values.items()),
    ]


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


def test_learns_and_a_resumed_run_is_the_same_run(config, recipe, tmp_path):
    cfg = load_config(config, [*recipe, f"CHECKPOINT.KEEP={EPOCHS}"])
    straight = DefaultTrainer(cfg)
    before = DefaultTrainer.test(cfg, straight.model)["synthetic"]["mAP"]
    straight.train()
    assert losses(straight)[-1] < losses(straight)[0]
    assert straight.results["synthetic"]["mAP"] > before + 5

    half = tmp_path / "half"
    half.mkdir()
    shutil.copy(straight.folder / f"checkpoint_{EPOCHS // 2:04d}.pth", half)
    checkpoint.point_to_last(half / f"checkpoint_{EPOCHS // 2:04d}.pth")
    torch.rand(5)
    resumed = DefaultTrainer(load_config(config, [*recipe, f"OUTPUT_DIR={half}", f"CHECKPOINT.KEEP={EPOCHS}"]))
    resumed.resume()
    resumed.train()
    assert differing(resumed.state_dict(), straight.state_dict()) == []
    assert resumed.results == straight.results
    assert losses(resumed) == losses(straight)[EPOCHS // 2 :]


def test_two_processes_agree_with_each_other_and_with_one(config, recipe, launch, tmp_path):
    plain = ["MODEL.GHOST_BATCH=16", "SOLVER.OPTIMIZER=SGD", "SOLVER.BASE_LR=0.0003"]  # larger steps magnify rounding
    short = [*recipe, *plain, "SOLVER.EPOCHS=2", "SOLVER.ITERS_PER_EPOCH=3"]
    one, two = launch(2, tmp_path / "two", short, config)
    assert differing(one, two) == []
    single = DefaultTrainer(load_config(config, short))
    single.train()
    assert torch.equal(single.hook(ReclusterHook).pseudo.labels, one["labels"])
    for name, value in single.model.state_dict().items():
        torch.testing.assert_close(
            one["model"][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name} {m}"
        )
