"""A foreign file becomes one of ours that loads again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastreid_uns.commands import convert
from fastreid_uns.modeling.backbones.small_net import SmallNet
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.heads import EmbeddingHead
from fastreid_uns.modeling.weights import load_weights

NETWORK = ["MODEL.BACKBONE.NAME", "SmallNet", "MODEL.BACKBONE.WIDTH", "4", "INPUT.SIZE", "[32, 16]"]


@pytest.fixture(scope="module")
def tool():
    return convert


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_converted_file_loads_as_ours(tool, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    state = {name: value + 3 for name, value in SmallNet((32, 16), width=4).state_dict().items()}
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "w.pth")
    target = tmp_path / "new" / f"ours{suffix}"
    tool.main([str(tmp_path / "w.pth"), str(target), *NETWORK])
    text = capsys.readouterr().out
    assert "100.0% of the backbone" in text
    assert "set MODEL.WEIGHTS to it" in text

    encoder = Encoder(SmallNet((32, 16), width=4), EmbeddingHead(32), mean=[0.5] * 3, std=[0.5] * 3)
    report = load_weights(encoder, str(target))
    assert report.family == "fastreid_uns"
    assert report.missing == []
    torch.testing.assert_close(dict(encoder.backbone.state_dict()), state)


def test_other_endings_are_refused_before_anything_is_read(tool, capsys) -> None:
    assert tool.main(["nowhere.pth", "out.onnx"]) == 2
    assert "out.onnx: files end in .safetensors or .pth" in capsys.readouterr().err
