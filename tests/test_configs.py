"""Every YAML of the repository loads, is completed and builds; those of the projects keep to their paper and train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from fastreid_uns.config import deviations, load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.solver import build_optimizer, build_schedule
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.registry import (
    AUGMENT_REGISTRY,
    DATASET_REGISTRY,
    HOOK_REGISTRY,
    PSEUDO_LABEL_REGISTRY,
    SAMPLER_REGISTRY,
)

ROOT = Path(__file__).parents[1]
DATA = sorted(ROOT.glob("configs/datasets/*.yaml"))
PROJECTS = sorted([*ROOT.glob("projects/*/configs/*.yaml"), *ROOT.glob("projects/*/configs/ablations/*.yaml")])
FILES = [*sorted(ROOT.glob("configs/*.yaml")), *DATA, *PROJECTS]
FRAGMENTS = {path: [path] for path in DATA}  # what is no config by itself → what goes on top of the base
FRAGMENTS |= {path: [path] for path in PROJECTS if path.stem == "method"}
FRAGMENTS |= {path: [path.with_stem("method"), path] for path in PROJECTS if path.match("configs/baseline.yaml")}

OURS = ("synthetic", "omniglot", "grocery")  # sets that no paper knows
SUM = ROOT / "projects/Best"  # of several papers, so none states its settings
SMALL = ["INPUT.SIZE=[64, 32]", "MODEL.WEIGHTS=''"]
SHALLOW = ["MODEL.BACKBONE.DEPTH=1"]  # all blocks of a transformer are alike


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    """The latest model, by what it was built from; most files differ in their data set only."""
    return {}


def load(path: Path, folder: Path, overrides: Sequence[str] = SMALL):
    if path not in FRAGMENTS:
        return load_config(path, overrides)
    whole = folder / "whole.yaml"
    parts = [ROOT / "configs/base.yaml", *FRAGMENTS[path]]
    whole.write_text(yaml.safe_dump({"_BASE_": [str(part) for part in parts]}))
    return load_config(whole, overrides)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def weights_of_zeros(monkeypatch):
    """Drawing them takes longer than all else, and shapes do not depend on them."""
    for draw in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, draw, lambda weights, *given, **named: weights.zero_())


@pytest.mark.parametrize("path", FILES, ids=name)
@pytest.mark.usefixtures("weights_of_zeros")
def test_file_builds(path, tmp_path, models):
    cfg = load(path, tmp_path)
    if cfg.MODEL.BACKBONE.NAME == "ViT":
        cfg = load(path, tmp_path, [*SMALL, *SHALLOW])
    assert bool(cfg.PLUGINS) == path.is_relative_to(ROOT / "projects")
    key = cfg.MODEL.dump() + cfg.INPUT.dump() + str(list(cfg.DATASETS.SOURCES))
    if key not in models:
        models.clear()
        models[key] = build_model(cfg, 64)
    model = models[key]
    build_schedule(cfg, build_optimizer(cfg, model))
    where = (cfg.SOLVER.ITERS_PER_EPOCH, cfg.SEED, 0, 1)
    assert len(SAMPLER_REGISTRY.build(cfg.DATALOADER.SAMPLER, *where)) == cfg.SOLVER.ITERS_PER_EPOCH
    if cfg.DATASETS.SOURCES:
        SAMPLER_REGISTRY.build(cfg.DATALOADER.SOURCE_SAMPLER, *where)
    PSEUDO_LABEL_REGISTRY.build(cfg.PSEUDO_LABELS)
    for hook in cfg.HOOKS.values():
        HOOK_REGISTRY.build(hook)
    for preset in cfg.INPUT.AUGMENTS.values():
        AUGMENT_REGISTRY.build(preset)
    assert set(cfg.INPUT.VIEWS) <= set(cfg.INPUT.AUGMENTS)
    for section in (cfg.DATASETS.TRAIN, *cfg.DATASETS.SOURCES.values(), *cfg.DATASETS.TESTS.values()):
        assert not section.NAME or DATASET_REGISTRY.get(section.NAME)
    with torch.no_grad():
        feats = model.eval().extract(torch.zeros(2, 3, 64, 32, dtype=torch.uint8))["feats"]
    assert feats.shape == (2, model.deploy.dim)


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_config_of_a_data_set_says_nothing_about_methods(path):
    assert set(yaml.safe_load(path.read_text())) <= {"DATASETS", "INPUT", "TEST"}


@pytest.mark.parametrize("path", [path for path in PROJECTS if path not in FRAGMENTS], ids=name)
def test_config_of_a_project_keeps_to_its_paper_and_makes_a_step(path, tiny_set, tmp_path):
    cfg = load_config(path)
    assert bool(cfg.PAPER) != (path.stem.startswith(OURS) or path.is_relative_to(SUM))
    assert deviations(cfg) == []
    trainer = DefaultTrainer(load_config(path, reduced(cfg, tiny_set, tmp_path)))
    before = {key: value.clone() for key, value in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.iter == 1
    after = dict(trainer.model.named_parameters())
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[key], value) for key, value in after.items())


def reduced(cfg, tiny_set: dict, folder: Path) -> list[str]:
    """Overrides that leave the method as it is, for one step on few small images."""
    values = {
        "DATASETS.TRAIN": tiny_set,
        "INPUT.SIZE": [64, 32],
        "INPUT.CAMERA_STYLE.KIND": "colors",
        "DATALOADER.CACHE": "device",
        "DATALOADER.WORKERS": 0,
        "DATALOADER.SAMPLER.BATCH_SIZE": 16,
        "MODEL.WEIGHTS": "",
        "MODEL.GHOST_BATCH": 8,
        "SOLVER.EPOCHS": 1,
        "SOLVER.ITERS_PER_EPOCH": 1,
        "SOLVER.AMP": "none",
        "CHECKPOINT.PERIOD": 0,
        "LOG.WRITERS": [],
        "OUTPUT_DIR": str(folder / "run"),
    }
    values |= {f"DATASETS.TESTS.{test}": None for test in cfg.DATASETS.TESTS}
    values |= {f"DATASETS.SOURCES.{source}": {**tiny_set, "SEED": 5} for source in cfg.DATASETS.SOURCES}
    if cfg.DATASETS.SOURCES:
        values["DATALOADER.SOURCE_SAMPLER.BATCH_SIZE"] = 16
    values |= {f"HOOKS.{hook}.WEIGHTS": "" for hook, section in cfg.HOOKS.items() if "WEIGHTS" in section}
    if "CLUSTERS" in cfg.DATALOADER.SAMPLER:
        values["DATALOADER.SAMPLER.CLUSTERS"] = 4
    if cfg.MODEL.BACKBONE.NAME == "ViT":
        values["MODEL.BACKBONE.DEPTH"] = 1
    else:
        values["MODEL.BACKBONE"] = {"NAME": "SmallNet", "WIDTH": 8}
    few_images = {"K1": 8, "K2": 3, "MIN_SAMPLES": 2, "CLUSTERS": 6, "NUM_CLUSTERS": 6}
    values |= {f"PSEUDO_LABELS.{key}": value for key, value in few_images.items() if key in cfg.PSEUDO_LABELS}
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
