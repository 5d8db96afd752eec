"""A config that was dumped loads again as the same one, in the words of today and in those of before."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from fastreid_uns.config import CfgNode, load_config, parse_config, refuse_other_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.predictor import FeatureExtractor, load_run

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
FILES = sorted([*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/*/configs/**/*.yaml")])


def load(path: Path, folder: Path) -> CfgNode:
    """A config, also of a file that only makes sense on top of a method."""
    method = next((p / "configs/method.yaml" for p in path.parents if (p / "configs/method.yaml").is_file()), None)
    if method is None or not (path.parent.name == "parts" or path.name == "baseline.yaml"):
        return load_config(path)
    whole = folder / "whole.yaml"
    whole.write_text(yaml.safe_dump({"_BASE_": [str(ROOT / "configs/base.yaml"), str(method), str(path)]}))
    return load_config(whole)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_dumped_loads_as_an_equal_config(path, tmp_path):
    cfg = load(path, tmp_path)
    text = cfg.dump()
    (tmp_path / "config.yaml").write_text(text)
    for again in (parse_config(text), load_config(tmp_path / "config.yaml")):
        assert again == cfg
        assert again.dump() == text, "the order of maps, such as SOURCES, must stay as well"


@pytest.mark.parametrize(
    "emptied", ["MODEL: {LOSSES: {contrast: null}}", "MODEL: {LOSSES: {}}", "MODEL: {LOSSES: null}"]
)
def test_an_emptied_map_stays_empty(emptied, tmp_path):
    (tmp_path / "a.yaml").write_text(emptied)
    cfg = load_config(tmp_path / "a.yaml")
    assert cfg.MODEL.LOSSES == {}
    assert parse_config(cfg.dump()).MODEL.LOSSES == {}
    again = load_config(tmp_path / "a.yaml", ["MODEL.LOSSES.own.NAME", "SoftTripletLoss"])
    assert list(parse_config(again.dump()).MODEL.LOSSES) == ["own"]


def test_the_order_of_a_map_is_the_one_that_was_written(tmp_path):
    (tmp_path / "a.yaml").write_text("DATASETS: {TESTS: {z: {NAME: synthetic}, a: {NAME: synthetic}}}")
    cfg = load_config(tmp_path / "a.yaml")
    assert list(parse_config(cfg.dump()).DATASETS.TESTS) == ["z", "a"]


def images() -> torch.Tensor:
    return (torch.arange(2 * 3 * 32 * 16) % 251).reshape(2, 3, 32, 16).to(torch.uint8)


def test_a_checkpoint_of_version_0_1_gives_the_features_of_then():
    file = GOLDEN / "acfl_0.1.pth"
    content, model = load_run(file)
    assert type(model).__name__ == "ACFL"
    extractor = FeatureExtractor.from_checkpoint(file, device="cpu")
    torch.testing.assert_close(extractor(images()), content["golden_feats"], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_version_0_1_is_evaluated(tmp_path):
    content = torch.load(GOLDEN / "acfl_0.1.pth", weights_only=True)
    shutil.copy(GOLDEN / "acfl_0.1.pth", tmp_path / "checkpoint_0002.pth")
    (tmp_path / "last").write_text("checkpoint_0002.pth\n")
    model = DefaultTrainer.load_model(parse_config(content["config"], "x", ["OUTPUT_DIR", str(tmp_path)]))
    with torch.no_grad():
        feats = model.eval().extract(images())["feats"]
    torch.testing.assert_close(feats, content["golden_feats"], rtol=1e-4, atol=1e-5)


def test_a_config_of_version_0_1_is_translated():
    text = (GOLDEN / "core_0.1.yaml").read_text()
    old, cfg = yaml.safe_load(text), parse_config(text, "core_0.1.pth")
    assert old["MODEL"]["NORM_GROUP"] == cfg.MODEL.GHOST_BATCH == 8
    assert old["INPUT"]["CAMERA_STYLE"]["KIND"] == "colours"
    assert cfg.INPUT.CAMERA_STYLE.KIND == "colors"
    assert old["LOG"]["PERIOD"] == cfg.LOG.PERIOD_STEPS
    assert old["INPUT"]["AUGMENTS"]["train"]["JITTER"] == cfg.INPUT.AUGMENTS.train.JITTER
    assert cfg.DATALOADER.CACHE == "host"
    assert "PROTOCOL" not in cfg
    assert parse_config(cfg.dump()) == cfg


def test_a_run_may_go_on_from_a_config_of_version_0_1():
    text = (GOLDEN / "core_0.1.yaml").read_text()
    refuse_other_config(text, parse_config(text).dump(), "core_0.1.pth")
    with pytest.raises(ValueError, match=r"core_0\.1\.pth was made with.*differ: MODEL\.GHOST_BATCH: 8 -> 16"):
        refuse_other_config(text, parse_config(text, "x", ["MODEL.GHOST_BATCH", "16"]).dump(), "core_0.1.pth")


def test_what_does_not_steer_training_may_differ_and_the_rest_is_named():
    saved = load_config(overrides=["OUTPUT_DIR=a", "DATASETS.TRAIN={NAME: folder, ROOT: here}"])
    free = load_config(overrides=["OUTPUT_DIR=b", "DATASETS.TRAIN={NAME: folder, ROOT: there}", "SOLVER.EPOCHS=90"])
    refuse_other_config(saved.dump(), free.dump(), "x.pth")
    other = load_config(overrides=["SOLVER.BASE_LR=0.2", "DATASETS.TRAIN={NAME: folder, ROOT: here}"])
    with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR: 0\.00035 -> 0\.2.*MODEL\.WEIGHTS x\.pth"):
        refuse_other_config(saved.dump(), other.dump(), "x.pth")


def test_more_epochs_are_refused_where_the_schedule_depends_on_them():
    short, long = (load_config(overrides=["SOLVER.SCHEDULE=cosine", f"SOLVER.EPOCHS={n}"]).dump() for n in (2, 9))
    with pytest.raises(ValueError, match=r"SOLVER\.EPOCHS: 2 -> 9\. The cosine schedule falls over the whole run"):
        refuse_other_config(short, long, "x.pth")
