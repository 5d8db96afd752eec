"""Every YAML of the repository loads, is completed, and builds all that needs no images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from fastreid_uns.config import load_config
from fastreid_uns.data.augment import Augment
from fastreid_uns.engine.solver import build_optimizer, build_schedule
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.registry import DATASET_REGISTRY, HOOK_REGISTRY, PSEUDO_LABEL_REGISTRY, SAMPLER_REGISTRY

ROOT = Path(__file__).parents[1]
FRAGMENTS = sorted(ROOT.glob("configs/datasets/*.yaml"))
FILES = [*sorted(ROOT.glob("configs/*.yaml")), *FRAGMENTS, *sorted(ROOT.glob("projects/*/configs/*.yaml"))]
SMALL = ["INPUT.SIZE=[64, 32]", "MODEL.WEIGHTS=''"]


@pytest.fixture(scope="module")
def models() -> dict[str, torch.nn.Module]:
    """The latest model, by what it was built from; most files differ in their data set only."""
    return {}


def load(path: Path, folder: Path):
    if path not in FRAGMENTS:
        return load_config(path, SMALL)
    whole = folder / "whole.yaml"
    whole.write_text(yaml.safe_dump({"_BASE_": [str(ROOT / "configs/base.yaml"), str(path)]}))
    return load_config(whole, SMALL)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_builds(path, tmp_path, models):
    cfg = load(path, tmp_path)
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
        Augment(**{name.lower(): value for name, value in preset.items()})
    assert set(cfg.INPUT.VIEWS) <= set(cfg.INPUT.AUGMENTS)
    for section in (cfg.DATASETS.TRAIN, *cfg.DATASETS.SOURCES.values(), *cfg.DATASETS.TESTS.values()):
        assert not section.NAME or DATASET_REGISTRY.get(section.NAME)
    with torch.no_grad():
        feats = model.eval().extract(torch.zeros(2, 3, 64, 32, dtype=torch.uint8))["feats"]
    assert feats.shape == (2, model.deploy.dim)


@pytest.mark.parametrize("path", FRAGMENTS, ids=lambda path: path.stem)
def test_config_of_a_data_set_says_nothing_about_methods(path):
    assert set(yaml.safe_load(path.read_text())) <= {"DATASETS", "INPUT", "TEST"}
