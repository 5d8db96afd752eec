"""The network of TransReID-SSL: the files of its authors arrive to the last tensor, and it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastreid_uns.config import load_config
from fastreid_uns.engine.solver import build_optimizer
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.modeling.encoder import Encoder, build_encoder
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.modeling.norm import GhostBatchNorm
from fastreid_uns.modeling.positions import Positions
from fastreid_uns.projects.authors_files import KINDS, body, load, renamed, transreid_file

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = ["vit_01_plain", "vit_02_ics", "vit_03_overlap"]


def encoder_for(content: dict[str, Any], *changes: str) -> Encoder:
    """The network of the recipe in the size of a golden file, whose images get no stochastic depth."""
    height, width = content["par_size"].tolist()
    keys = [f"MODEL.BACKBONE.{key}={content[f'par_{key.lower()}']}" for key in ("WIDTH", "DEPTH", "HEADS", "STRIDE")]
    keys += [f"MODEL.BACKBONE.CONV_STEM={bool(content['par_conv_stem'])}", "MODEL.BACKBONE.DROP_PATH=0.0"]
    keys += [f"INPUT.SIZE=[{height}, {width}]", "MODEL.BACKBONE.PRETRAINED_GRID=[]", "PAPER={}", *changes]
    return build_encoder(load_config(CONFIGS / "market.yaml", keys))


@pytest.mark.parametrize("name", FILES)
def test_it_computes_what_the_official_network_computes(name, read_golden, tmp_path):
    content, state, images = read_golden(name)
    encoder = encoder_for(content)
    report = load(encoder, state, tmp_path)
    assert (report.missing, report.mismatched, report.unexpected, report.passed_over) == ([], [], [], {})
    with torch.no_grad():
        encoder.eval()
        patches = encoder.backbone.patch_embed(images).flatten(2).mT[:, :, :8]
        tokens = encoder.backbone(images)
        feats = encoder.head(tokens).feats
        trained = encoder.train().head(encoder.backbone(images)).feats
    for key, found in {"patches_eval": patches, "class_token_eval": tokens.tokens[:, 0], "feats_eval": feats}.items():
        torch.testing.assert_close(found, torch.from_numpy(content[f"out_{key}"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(trained, torch.from_numpy(content["out_feats_train"]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["vit_pos_01", "vit_pos_02"])
def test_positions_are_resized_as_the_official_code_does(name):
    golden = np.load(Path(__file__).parent / "golden" / f"{name}.npz")
    old, new = (tuple(golden[key].tolist()) for key in ("par_old_grid", "par_new_grid"))
    assert load_config(CONFIGS / "market.yaml").MODEL.BACKBONE.POSITION_RESIZE == "bilinear"
    positions = Positions(new, old, "bilinear")
    found = positions.fit(torch.from_numpy(golden["in_pos_embed"]), 1 + new[0] * new[1])
    torch.testing.assert_close(found, torch.from_numpy(golden["out_pos_embed"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_01_plain", "vit_02_ics"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_of_each_kind_of_file_has_its_place(kind, name, read_golden, tmp_path):
    content, state, _ = read_golden(name)
    encoder = encoder_for(content)
    report = load(encoder, transreid_file(kind, state), tmp_path)
    with_neck = kind.endswith("supervised")
    assert (report.share, report.unexpected, report.mismatched) == (1.0, [], [])
    assert [n for n in report.missing if n.startswith("backbone.")] == []
    assert (report.missing == []) == with_neck
    got = encoder.state_dict()
    for key, value in body(state).items():
        assert torch.equal(got[f"backbone.{key}"], value), key
    if with_neck:
        assert torch.equal(got["head.embed.neck.running_mean"], state["bottleneck.running_mean"])


def test_adaptation_starts_with_a_fresh_neck(read_golden, tmp_path):
    """As in the released code, which passes over the neck of the supervised network."""
    content, state, _ = read_golden("vit_02_ics")
    encoder = encoder_for(content)
    before = {name: value.clone() for name, value in encoder.head.state_dict().items()}
    report = load(encoder, {**renamed(body(state), "base."), "bottleneck.weight": torch.ones(9)}, tmp_path, head=False)
    torch.testing.assert_close(dict(encoder.head.state_dict()), before)
    assert list(report.passed_over) == ["bottleneck.weight"]
    assert "MODEL.WEIGHTS_HEAD is false" in report.passed_over["bottleneck.weight"]
    for config in ("msmt_market", "market_msmt"):
        assert load_config(CONFIGS / f"{config}.yaml").MODEL.WEIGHTS_HEAD is False


WRONG = {
    "another layout, ICS for plain": (
        "vit_02_ics",
        {"par_conv_stem": 0},
        r"1 tensors of the backbone have another shape in the file, such as backbone\.patch_embed\.proj\.weight "
        r"\(384, 64, 8, 8\) for \(384, 3, 16, 16\)\. By its tensors the file is of a network with CONV_STEM True "
        r"instead of False\. Set MODEL\.BACKBONE",
    ),
    "another layout, plain for ICS": ("vit_01_plain", {"par_conv_stem": 1}, r"CONV_STEM False instead of True"),
    "another width": (
        "vit_01_plain",
        {"par_width": 96},
        r"0\.0% of the.*with WIDTH 48 instead of 96\. Set MODEL\.BACK",
    ),
    "fewer blocks": ("vit_01_plain", {"par_depth": 6}, r"at least 90% are needed\. By its.*DEPTH 3 instead of 6"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_of_another_network_is_refused_with_what_differs(case, read_golden, tmp_path):
    name, other, message = WRONG[case]
    content, state, _ = read_golden(name)
    encoder = encoder_for({**content, **other})
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(InvalidState, match=message):
        load(encoder, state, tmp_path)
    torch.testing.assert_close(dict(encoder.state_dict()), before)


def test_a_file_of_another_grid_is_refused(read_golden, tmp_path):
    """The recipe states the grid of the authors' files; ImageNet weights have another one."""
    content, state, _ = read_golden("vit_01_plain")
    encoder = encoder_for(content, "MODEL.BACKBONE.PRETRAINED_GRID=[16, 8]")
    with pytest.raises(InvalidValue, match=r"PRETRAINED_GRID is 16x8, but the position embedding.*has 8 patches, such"):
        load(encoder, state, tmp_path)


def test_a_neck_of_another_size_is_refused(read_golden, tmp_path):
    content, state, _ = read_golden("vit_01_plain")
    neck = renamed(dict(nn.BatchNorm1d(96).state_dict()), "bottleneck.")
    message = (
        r"4 tensors of the head have another shape.*neck\.\w+ \(96,\) for \(48,\)\. Set MODEL\.HEAD to.*WEIGHTS_HEAD"
    )
    with pytest.raises(InvalidState, match=message):
        load(encoder_for(content), {**state, **neck}, tmp_path)
    assert load(encoder_for(content), {**state, **neck}, tmp_path, head=False).share == 1.0


def test_a_file_without_a_class_token_is_said_to_lack_it(read_golden, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    content, state, _ = read_golden("vit_01_plain")
    state.pop("cls_token")
    load(encoder_for(content), state, tmp_path)
    assert (
        "1 tensors of the backbone are not in the file and keep their random values: backbone.cls_token." in caplog.text
    )


def test_batch_norm_of_the_stem_counts_the_images_of_a_card():
    """IBN, IBN, batch norm and the neck are all that depends on the batch."""
    small = ["MODEL.WEIGHTS=", "MODEL.BACKBONE.DEPTH=1", "INPUT.SIZE=[32, 16]", "PAPER={}"]
    model = build_model(load_config(CONFIGS / "market.yaml", small), 8)
    groups = [module.group for module in model.modules() if isinstance(module, GhostBatchNorm)]
    assert groups == [64] * 4


def test_all_parameters_decay_and_depth_is_stochastic_up_to_the_published_rate():
    cfg = load_config(CONFIGS / "market.yaml", ["MODEL.WEIGHTS=", "PAPER={}"])
    model = build_model(cfg, 8)
    groups = build_optimizer(cfg, model).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0005}
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.encoder.backbone.blocks]
    assert rates == pytest.approx([0.3 * i / 11 for i in range(12)])
