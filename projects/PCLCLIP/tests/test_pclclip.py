"""The network of PCL-CLIP: files of CLIP arrive to the last tensor, whatever their names, and it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.solver import learning_rate_factor
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.modeling.backbones.base import Tokens
from fastreid_uns.modeling.encoder import Encoder, build_encoder
from fastreid_uns.modeling.positions import Positions
from fastreid_uns.modeling.weights import load_weights
from fastreid_uns.projects.authors_files import load, renamed
from fastreid_uns.projects.PCLCLIP.heads import ClipHead

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = ["clip_01", "clip_02_two_heads"]
BLOCK = {
    "ln_1": "norm1",
    "ln_2": "norm2",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj": "attn.proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
WHOLE = {"conv1": "patch_embed.proj", "ln_pre": "norm_pre", "ln_post": "norm", "transformer.resblocks": "blocks"}


def encoder_for(content: dict[str, Any], *changes: str) -> Encoder:
    """The network of the recipe in the size of a golden file."""
    keys = [f"MODEL.BACKBONE.{key}={content[f'par_{key.lower()}']}" for key in ("WIDTH", "DEPTH", "HEADS", "STRIDE")]
    keys += [f"INPUT.SIZE={content['par_size'].tolist()}", f"MODEL.HEAD.DIM={content['par_proj']}"]
    keys += ["MODEL.BACKBONE.PRETRAINED_GRID=[]", "PAPER={}", *changes]
    return build_encoder(load_config(CONFIGS / "market.yaml", keys))


def names_of_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The table of the published conversion, by plain replacement."""
    found = {
        "cls_token": state["class_embedding"].reshape(1, 1, -1),
        "pos_embed": state["positional_embedding"][None],
        "head.weight": state["proj"].T.contiguous(),
        "head.bias": torch.zeros(state["proj"].shape[1]),
    }
    for name, value in state.items():
        for old, new in [*WHOLE.items(), *(BLOCK.items() if "resblocks" in name else ())]:
            name = name.replace(old, new)
        if name not in ("class_embedding", "positional_embedding", "proj"):
            found[name] = value
    return found


@pytest.fixture
def official(read_golden, seeded_tensors):
    """Content of a golden file, CLIP's image encoder, the two necks, and the images."""

    def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], Tensor]:
        content, state, images = read_golden(name)
        return content, state, seeded_tensors(content["in_neck_keys"], content["par_seed"] + 5000), images

    return read


@pytest.mark.parametrize("name", FILES)
def test_it_computes_what_the_official_network_computes(name, official, tmp_path):
    content, state, necks, images = official(name)
    encoder = encoder_for(content)
    report = load(encoder, {**renamed(state, "image_encoder."), **necks}, tmp_path)
    assert (report.missing, report.mismatched, report.unexpected, report.passed_over) == ([], [], [], {})
    with torch.no_grad():
        out = encoder.eval().head(encoder.backbone(images))
        projected = encoder.head.projected.project(out.pooled)
        trained = encoder.train().head(encoder.backbone(images))
    found = {"class_token": out.pooled, "projected": projected, "raw_eval": out.unnormalized, "feats_eval": out.feats}
    for key, value in found.items():
        torch.testing.assert_close(value, torch.from_numpy(content[f"out_{key}"]), rtol=0, atol=1e-5)
    torch.testing.assert_close(trained.feats, torch.from_numpy(content["out_feats_train"]), rtol=0, atol=2e-5)
    torch.testing.assert_close(trained.unnormalized, torch.from_numpy(content["out_raw_train"]), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["openai", "image encoder alone", "timm", "supervised", "unsupervised"])
@pytest.mark.parametrize("half", [False, True])
def test_every_tensor_of_each_kind_of_file_has_its_place(kind, half, official, tmp_path):
    content, state, necks, _ = official("clip_02_two_heads")
    if half:
        state = {name: value.half() for name, value in state.items()}
    text = {
        "transformer.resblocks.0.ln_1.weight": torch.ones(4),
        "token_embedding.weight": torch.ones(5, 4),
        "positional_embedding": torch.ones(7, 4),
        "ln_final.weight": torch.ones(4),
        "text_projection": torch.ones(4, 4),
        "logit_scale": torch.tensor(1.0),
    }
    tuned = {**renamed(state, "image_encoder."), **necks}
    file, passed_over = {
        "openai": ({**renamed(state, "visual."), **text}, set(text)),
        "image encoder alone": (state, set()),
        "timm": (names_of_timm(state), {"head.bias"}),
        "supervised": ({**tuned, "classifier.weight": torch.ones(3, 4)}, {"classifier.weight"}),
        "unsupervised": ({"state_dict": renamed(tuned, "module."), "epoch": 60, "best_mAP": 0.9}, set()),
    }[kind]
    encoder = encoder_for(content)
    report = load(encoder, file, tmp_path)
    assert (report.share, report.unexpected, report.mismatched) == (1.0, [], [])
    assert set(report.passed_over) == passed_over
    assert {name for name in report.missing if "neck" not in name} == set()
    assert (report.missing == []) == kind.endswith("supervised")
    got = encoder.state_dict()
    for name, value in names_of_timm(state).items():
        if name not in ("head.weight", "head.bias"):
            assert torch.equal(got[f"backbone.{name}"], value.float()), name
    assert torch.equal(got["head.projected.project.weight"], state["proj"].T.float())


def test_the_file_that_timm_publishes_is_safetensors(official, tmp_path):
    content, state, _, _ = official("clip_01")
    save_file(names_of_timm(state), tmp_path / "model.safetensors")
    report = load_weights(encoder_for(content), str(tmp_path / "model.safetensors"))
    assert (report.family, report.share) == ("CLIP of timm", 1.0)


def test_the_network_is_that_of_timm(official, tmp_path):
    """The activation included: with the plain GELU it would be off by more than this."""
    timm = pytest.importorskip("timm")
    content, state, _, images = official("clip_01")
    size = {"embed_dim": 64, "num_heads": 1, "img_size": tuple(content["par_size"].tolist()), "num_classes": 32}
    net = timm.create_model("vit_base_patch16_clip_quickgelu_224", **size).eval()
    net.load_state_dict(names_of_timm(state))
    encoder = encoder_for(content).eval()
    load(encoder, state, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(encoder.head(encoder.backbone(images)).pooled, net.forward_features(images)[:, 0])


@pytest.mark.parametrize("name", ["clip_pos_01", "clip_pos_02"])
def test_positions_are_resized_as_the_official_code_does(name):
    golden = np.load(Path(__file__).parent / "golden" / f"{name}.npz")
    stride, grid = (16, (16, 8)) if name == "clip_pos_01" else (12, (21, 10))
    assert tuple(golden["par_new_grid"].tolist()) == grid
    keys = ["MODEL.BACKBONE.DEPTH=1", f"MODEL.BACKBONE.STRIDE={stride}", "PAPER={}"]
    positions: Positions = build_encoder(load_config(CONFIGS / "market.yaml", keys)).backbone.positions
    assert positions.grid == grid
    found = positions.fit(torch.from_numpy(golden["in_pos_embed"])[None], 1 + grid[0] * grid[1])
    torch.testing.assert_close(found[0], torch.from_numpy(golden["out_pos_embed"]), rtol=0, atol=1e-6)


def test_two_necks_and_one_length_by_hand():
    """In evaluation a fresh neck divides by sqrt(1 + 1e-5)."""
    head = ClipHead(2, dim=1).eval()
    head.projected.project.weight.data = torch.tensor([[1.0, -1.0]])
    out = head(Tokens(torch.zeros(1, 2, 1, 1), torch.tensor([[[3.0, 1.0], [9.0, 9.0]]])))
    expected = torch.tensor([[3.0, 1.0, 2.0]])
    torch.testing.assert_close(out.unnormalized, expected / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(out.feats, F.normalize(expected))
    assert out.pooled.tolist() == [[3.0, 1.0]]
    assert head.dim == 3
    assert {name for name, p in head.named_parameters() if not p.requires_grad} == {
        "embed.neck.bias",
        "projected.neck.bias",
    }


def test_a_head_without_a_projection_is_refused():
    with pytest.raises(InvalidValue, match=r"MODEL\.HEAD\.DIM is 0; 1 or more is accepted \(512 for CLIP\)"):
        ClipHead(8, dim=0)


GRID = "MODEL.BACKBONE.PRETRAINED_GRID"
WRONG = {
    "another width": ({"par_width": 128}, r"0\.0% of the backbone.*WIDTH 64 instead of 128"),
    "another depth": ({"par_depth": 24}, r"at least 90% are needed.*DEPTH 12 instead of 24\. Set MODEL\.BACKBONE"),
    "a projection of another size": (
        {"par_proj": 16},
        r"1 tensors of the head.*head\.projected\.project\.weight \(32, 64\) for \(16, 64\)\. Set MODEL\.HEAD",
    ),
    "another grid": (
        {"grid": f"{GRID}=[14, 14]"},
        r"PRETRAINED_GRID is 14x14, but the position embedding.*has 8 patches, such as 4x2",
    ),
    "other patches": (
        {"patch": "MODEL.BACKBONE.PATCH=8", "stride": "MODEL.BACKBONE.STRIDE=8", "grid": f"{GRID}=[4, 2]"},
        r"1 tensors of the backbone have another shape.*PATCH 16 instead of 8",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_of_another_clip_is_refused_with_what_differs(case, official, tmp_path):
    content, state, _, _ = official("clip_01")
    other, message = WRONG[case]
    changes = [value for key, value in other.items() if not key.startswith("par_")]
    with pytest.raises((InvalidState, InvalidValue), match=message):
        load(encoder_for({**content, **other}, *changes), renamed(state, "visual."), tmp_path)


def test_a_transformer_that_is_no_clip_lacks_its_first_norm(official, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    content, state, _, _ = official("clip_01")
    plain = {k: v for k, v in names_of_timm(state).items() if not k.startswith(("norm_pre", "head"))}
    load(encoder_for(content), {**plain, "patch_embed.proj.bias": torch.ones(64)}, tmp_path)
    assert "keep their random values: backbone.norm_pre.weight, backbone.norm_pre.bias." in caplog.text
    assert "the file is of a network with PRE_NORM False instead of True, PATCH_BIAS True instead of" in caplog.text


def test_a_deeper_file_is_cut_and_says_so(official, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    content, state, _, _ = official("clip_01")
    report = load(encoder_for({**content, "par_depth": 10}), state, tmp_path)
    assert (report.share, len(report.unexpected)) == (1.0, 24)  # two blocks of twelve tensors
    assert "network with DEPTH 12 instead of 10. What both have was loaded." in caplog.text


def test_a_head_that_has_no_projection_passes_it_over(official, tmp_path):
    content, state, _, _ = official("clip_01")
    keys = ["MODEL.HEAD={NAME: TokenHead}", f"INPUT.SIZE={content['par_size'].tolist()}", "PAPER={}"]
    keys += [f"MODEL.BACKBONE.{key}={content[f'par_{key.lower()}']}" for key in ("WIDTH", "DEPTH", "HEADS")]
    encoder = build_encoder(load_config(CONFIGS / "market.yaml", [*keys, "MODEL.BACKBONE.PRETRAINED_GRID=[]"]))
    report = load(encoder, renamed(state, "visual."), tmp_path)
    assert report.passed_over == {"visual.proj": "projection into the space of texts, which this head has not"}
    assert (report.share, report.unexpected) == (1.0, [])


def test_the_rate_of_the_warm_up_is_that_of_the_published_log():
    """3.5e-6, 3.82e-5, ... and 3.5e-4 from epoch 10 on, constant within an epoch."""
    cfg = load_config(CONFIGS / "market.yaml")
    rates = [0.00035 * learning_rate_factor(cfg, 200 * epoch + 150) for epoch in (0, 1, 9, 10, 19, 20, 40)]
    assert rates == pytest.approx([3.5e-6, 3.815e-5, 3.1535e-4, 3.5e-4, 3.5e-4, 3.5e-5, 3.5e-6])


def test_only_the_projection_of_the_patches_is_frozen(tiny_set, tmp_path):
    """0.59 million numbers of ViT-B/16."""
    keys = [f"DATASETS.TRAIN={tiny_set}", "DATASETS.TESTS={market1501: null}", "INPUT.SIZE=[32, 16]", "PAPER={}"]
    keys += [
        "MODEL.BACKBONE.DEPTH=1",
        "MODEL.WEIGHTS=",
        "MODEL.DEVICE=cpu",
        "DATALOADER.WORKERS=0",
        f"OUTPUT_DIR={tmp_path / 'run'}",
    ]
    trainer = DefaultTrainer(load_config(CONFIGS / "market.yaml", [*keys, "LOG.WRITERS=[]"]))
    frozen = {name: p.numel() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    necks = {f"encoder.head.{part}.neck.bias" for part in ("embed", "projected")}
    assert frozen.keys() - necks == {"encoder.backbone.patch_embed.proj.weight"}
    assert frozen["encoder.backbone.patch_embed.proj.weight"] == 589_824
