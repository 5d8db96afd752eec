"""The network of PASS: the files of its authors arrive to the last tensor, and it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_uns.config import load_config
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.modeling.backbones.base import Tokens
from fastreid_uns.modeling.encoder import Encoder, build_encoder
from fastreid_uns.projects.authors_files import KINDS, body, load, renamed, transreid_file
from fastreid_uns.projects.PASS.heads import MultiNeckHead

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = ["pass_01_cat", "pass_02_mean", "pass_03_multineck_cat"]


def encoder_for(content: dict[str, Any], *changes: str) -> Encoder:
    """The network of a recipe in the size of a golden file, whose images get no stochastic depth."""
    keys = [f"MODEL.BACKBONE.{key}={content[f'par_{key.lower()}']}" for key in ("WIDTH", "DEPTH", "HEADS")]
    keys += [f"INPUT.SIZE={content['par_size'].tolist()}", f"MODEL.HEAD.FUSE={content['par_fusion']}"]
    keys += ["MODEL.BACKBONE.DROP_PATH=0.0", "MODEL.BACKBONE.PRETRAINED_GRID=[]", "PAPER={}", *changes]
    config = "msmt_market.yaml" if content["par_multi_neck"] else "market.yaml"
    return build_encoder(load_config(CONFIGS / config, keys))


@pytest.mark.parametrize("name", FILES)
def test_it_computes_what_the_official_network_computes(name, read_golden, tmp_path):
    content, state, images = read_golden(name)
    encoder = encoder_for(content)
    report = load(encoder, state, tmp_path)
    assert (report.missing, report.mismatched, report.unexpected, report.passed_over) == ([], [], [], {})
    with torch.no_grad():
        tokens = encoder.eval().backbone(images)
        out = encoder.head(tokens)
        trained = encoder.train().head(encoder.backbone(images))
    torch.testing.assert_close(tokens.tokens, torch.from_numpy(content["out_tokens_eval"]), rtol=0, atol=1e-5)
    for found, mode, tolerance in ((out, "eval", 1e-5), (trained, "train", 2e-5)):
        expected = torch.from_numpy(content[f"out_feats_{mode}"])
        torch.testing.assert_close(found.feats, F.normalize(expected), rtol=0, atol=tolerance)
        if content["par_multi_neck"]:
            torch.testing.assert_close(found.unnormalized, expected, rtol=0, atol=tolerance)
        else:
            torch.testing.assert_close(expected.norm(dim=1), torch.ones(len(expected)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_every_tensor_of_each_kind_of_file_has_its_place(kind, name, read_golden, tmp_path):
    content, state, _ = read_golden(name)
    encoder = encoder_for(content)
    report = load(encoder, transreid_file(kind, state), tmp_path)
    assert (report.share, report.unexpected, report.mismatched) == (1.0, [], [])
    assert (report.missing == []) == kind.endswith("supervised")
    got = encoder.state_dict()
    for i in (1, 2, 3):
        assert torch.equal(got["backbone.part_tokens"][:, i - 1], state[f"part_token{i}"][:, 0])
        assert torch.equal(got["backbone.part_pos"][:, i - 1], state[f"part{i}_pos"][:, 0])
        if kind.endswith("supervised") and content["par_multi_neck"]:
            own = got[f"head.part_embed.{i - 1}.neck.running_mean"]
            assert torch.equal(own, state[f"bottleneck_pt{i}.running_mean"])
    assert torch.equal(got["backbone.pos_embed"], torch.cat([state["cls_pos"], state["pos_embed"]], dim=1))
    for key in body(state).keys() - {"pos_embed", "cls_pos"}:
        assert key.startswith("part") or torch.equal(got[f"backbone.{key}"], state[key]), key


def test_positions_are_resized_without_the_row_of_the_class_token(read_golden, tmp_path):
    """From 4x2 patches to 6x3, bilinear, worked out channel by channel; 128 rows of PASS are patches only."""
    content, state, _ = read_golden("pass_01_cat")
    encoder = encoder_for(content, "INPUT.SIZE=[96, 48]", "MODEL.BACKBONE.PRETRAINED_GRID=[4, 2]")
    load(encoder, state, tmp_path)
    found = encoder.backbone.pos_embed.detach()[0]
    assert torch.equal(found[0], state["cls_pos"][0, 0])
    for channel in (0, 47):
        image = state["pos_embed"][0, :, channel].reshape(1, 1, 4, 2)
        expected = F.interpolate(image, size=(6, 3), mode="bilinear", align_corners=False).flatten()
        torch.testing.assert_close(found[1:, channel], expected, rtol=0, atol=1e-6)


def test_fusion_after_the_necks_by_hand():
    """In evaluation a fresh neck divides by sqrt(1 + 1e-5) only, which unit length takes out again."""
    head = MultiNeckHead(2, fuse="cat", parts=2).eval()
    tokens = torch.tensor([[[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]]])
    out = head(Tokens(torch.zeros(1, 2, 1, 1), tokens))
    torch.testing.assert_close(out.unnormalized, torch.tensor([[0.6, 0.8, 0.5, 0.5]]))
    torch.testing.assert_close(out.feats, torch.tensor([[0.6, 0.8, 0.5, 0.5]]) / 1.5**0.5)
    torch.testing.assert_close(out.pooled, torch.tensor([[3.0, 4.0, 2.5, 1.0]]))
    mean = MultiNeckHead(2, fuse="mean", parts=2).eval()
    out = mean(Tokens(torch.zeros(1, 2, 1, 1), tokens))
    torch.testing.assert_close(out.unnormalized, torch.tensor([[0.55, 0.65]]))


def test_wrong_keys_of_the_head():
    with pytest.raises(InvalidValue, match=r"FUSE: 'class' has no parts; accepted: mean, cat"):
        MultiNeckHead(8, fuse="class")
    with pytest.raises(InvalidValue, match=r"PARTS is 0; 1 or more"):
        MultiNeckHead(8, parts=0)
    tokens = Tokens(torch.zeros(2, 8, 1, 1), torch.zeros(2, 4, 8))
    with pytest.raises(InvalidValue, match=r"PARTS is 2 but the backbone gives 3 part tokens\. Set it to MODEL\.BACKB"):
        MultiNeckHead(8, parts=2)(tokens)


WRONG = {
    "another width": ({"par_width": 96}, r"0\.0% of the backbone.*WIDTH 48 instead of 96"),
    "a stem that PASS has not": (
        {"stem": "MODEL.BACKBONE.CONV_STEM=true"},
        r"at least 90% are needed\. By its tensors the file is of a network with CONV_STEM False instead of True",
    ),
    "fewer part tokens": (
        {"parts": "MODEL.BACKBONE.PART_TOKENS=2"},
        r"2 tensors of the backbone have another shape.*PART_TOKENS 3 instead of 2\. Set MODEL\.BACKBONE",
    ),
    "another grid": (
        {"grid": "MODEL.BACKBONE.PRETRAINED_GRID=[16, 8]"},
        r"PRETRAINED_GRID is 16x8, but the position embedding.*has 8 patches, such as 4x2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_of_another_network_is_refused_with_what_differs(case, read_golden, tmp_path):
    content, state, _ = read_golden("pass_01_cat")
    other, message = WRONG[case]
    changes = [value for key, value in other.items() if not key.startswith("par_")]
    with pytest.raises((InvalidState, InvalidValue), match=message):
        load(encoder_for({**content, **other}, *changes), state, tmp_path)


def test_a_neck_of_the_other_fusion_is_refused(read_golden, tmp_path):
    content, state, _ = read_golden("pass_01_cat")
    encoder = encoder_for({**content, "par_fusion": "mean"})
    with pytest.raises(InvalidState, match=r"head have another shape.* \(96,\) for \(48,\)\. Set MODEL\.HEAD to that"):
        load(encoder, state, tmp_path)
    report = load(encoder, state, tmp_path, head=False)
    assert report.share == 1.0
    assert {name.split(".")[0] for name in report.passed_over} == {"bottleneck"}


def test_a_network_without_part_tokens_says_what_it_does_not_use(read_golden, tmp_path):
    content, state, _ = read_golden("pass_01_cat")
    encoder = encoder_for({**content, "par_fusion": "class"}, "MODEL.BACKBONE.PART_TOKENS=0")
    report = load(encoder, body(state), tmp_path)
    assert report.share == 1.0
    assert report.unexpected == sorted([*(f"part_token{i}" for i in (1, 2, 3)), *(f"part{i}_pos" for i in (1, 2, 3))])


def test_part_tokens_that_a_file_lacks_are_named(read_golden, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    content, state, _ = read_golden("pass_01_cat")
    whole = torch.cat([state["cls_pos"], state["pos_embed"]], dim=1)
    plain = {name: value for name, value in body(state).items() if "part" not in name and name != "cls_pos"}
    load(encoder_for(content), {**plain, "pos_embed": whole}, tmp_path)
    assert "keep their random values: backbone.part_tokens, backbone.part_pos." in caplog.text


def test_a_neck_of_transreid_for_shuffled_patches_is_no_neck_of_a_part(read_golden, tmp_path):
    """Its `bottleneck_1` has the same name; only files with part tokens have necks of parts."""
    content, state, _ = read_golden("pass_03_multineck_cat")
    whole = torch.cat([state["cls_pos"], state["pos_embed"]], dim=1)
    plain = {name: value for name, value in body(state).items() if "part" not in name and name != "cls_pos"}
    other = renamed(dict(nn.BatchNorm1d(48).state_dict()), "bottleneck_1.")
    report = load(encoder_for(content), {**plain, "pos_embed": whole, **other}, tmp_path)
    assert "bottleneck_1.weight" in report.unexpected
