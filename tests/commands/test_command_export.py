from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastreid_uns.commands import export
from fastreid_uns.config import load_config
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.modeling.whitening import MainDirections
from fastreid_uns.predictor import FeatureExtractor

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the packages of the extra export",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "checkpoint.pth"
    keys = ["INPUT.SIZE=[32, 16]", "MODEL.BACKBONE.NAME=SmallNet", "MODEL.BACKBONE.WIDTH=8", "MODEL.GHOST_BATCH=4"]
    cfg = load_config(None, keys)
    torch.save({"model": build_model(cfg, 5).state_dict(), "config": cfg.dump(), "num_images": 5}, file)
    return file


@needs_onnx
def test_the_file_gives_the_features_of_the_encoder(checkpoint, tmp_path, capsys):
    import onnxruntime

    file = tmp_path / "deeper" / "small.onnx"
    assert export.main([str(checkpoint), str(file)]) == 0
    assert "32x16 RGB in 0..1 -> 64 features, batch free" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(str(file))
    pixels = np.random.default_rng(1).integers(0, 256, (7, 3, 32, 16), dtype=np.uint8)
    (feats,) = session.run(None, {"images": pixels.astype(np.float32) / 255})
    expected = FeatureExtractor.from_checkpoint(checkpoint, device="cpu")(torch.from_numpy(pixels))
    np.testing.assert_allclose(feats, expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(feats, axis=1), 1, atol=1e-5)
    sidecar = json.loads(file.with_suffix(".json").read_text())
    assert sidecar["input"]["shape"] == ["batch", 3, 32, 16]
    assert (sidecar["input"]["colours"], sidecar["input"]["range"]) == ("RGB", [0.0, 1.0])
    assert sidecar["output"]["shape"] == ["batch", 64]
    assert sidecar["config"]["MODEL"]["BACKBONE"]["NAME"] == "SmallNet"


@needs_onnx
def test_a_version_of_the_operators_that_cannot_be_written(checkpoint, tmp_path, capsys):
    assert export.main([str(checkpoint), str(tmp_path / "a.onnx"), "--opset", "3"]) == 2
    said = capsys.readouterr().err
    assert "cannot be written with --opset 3, only with 18. Leave the flag out" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


MEAN, STD = [0.3, 0.5, 0.7], [0.5, 0.25, 0.2]  # no numbers of anybody
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def whitened(tmp_path_factory):
    """A run as grouped photos leave it: fixed norm layers, a fitted whitening, and numbers not of ImageNet."""
    folder = tmp_path_factory.mktemp("photos")
    keys = ["INPUT.SIZE=[32, 16]", "MODEL.BACKBONE.NAME=SmallNet", "MODEL.BACKBONE.WIDTH=8", "MODEL.FREEZE_NORM=true"]
    keys += [
        "MODEL.HEAD.NAME=PooledHead",
        "MODEL.HEAD.DIM=12",
        "MODEL.HEAD.GRID=2",
        "MODEL.MEMORY.NAME=",
        "MODEL.LOSSES.contrast=null",
    ]
    cfg = load_config(None, [*keys, f"INPUT.MEAN={MEAN}", f"INPUT.STD={STD}"])
    torch.manual_seed(3)
    model = build_model(cfg, 5).eval()
    with torch.no_grad():
        pooled = model.encoder(torch.rand(40, 3, 32, 16)).pooled
        model.encoder.head.whitening.fit(MainDirections.of(pooled.view(20, 2, -1), 12))
    content = {"model": model.state_dict(), "config": cfg.dump(), "num_images": 5}
    torch.save(content, folder / "checkpoint_0001.pth")
    (folder / "last").write_text("checkpoint_0001.pth\n")
    return folder


@needs_onnx
@pytest.mark.parametrize(
    ("name", "where", "mean", "std"),
    [("inside", "inside", MEAN, STD), ("outside", "outside", MEAN, STD), ("imagenet", "outside", *IMAGENET)],
)
def test_the_sidecar_says_what_to_do_before_the_file(whitened, tmp_path, name, where, mean, std):
    import onnxruntime

    file = tmp_path / "photos.onnx"
    assert export.main([str(whitened), str(file), "--normalisation", name]) == 0
    told = json.loads(file.with_suffix(".json").read_text())["input"]
    assert (told["normalisation"], told["size"], told["resize"]) == (where, [32, 16], "bicubic")
    assert told["mean"] == pytest.approx(mean)
    assert told["std"] == pytest.approx(std)
    pixels = np.random.default_rng(2).integers(0, 256, (3, 3, 32, 16), dtype=np.uint8)
    given = pixels.astype(np.float32) / 255
    if where == "outside":
        for channel in range(3):
            given[:, channel] = (given[:, channel] - mean[channel]) / std[channel]
    (feats,) = onnxruntime.InferenceSession(str(file)).run(None, {"images": given})
    expected = FeatureExtractor.from_checkpoint(whitened, device="cpu")(torch.from_numpy(pixels))
    np.testing.assert_allclose(feats, expected.numpy(), atol=1e-4)
    assert feats.shape == (3, 12)


def test_a_file_that_differs_is_not_left(checkpoint, tmp_path, capsys, monkeypatch):
    file = tmp_path / "small.onnx"
    monkeypatch.setattr(export, "require_onnx", lambda: None)
    monkeypatch.setattr(export, "export", lambda extractor, output, opset: output.write_text("features"))
    for difference in (2e-4, float("nan")):
        monkeypatch.setattr(export, "largest_difference", lambda *_, value=difference: value)
        assert export.main([str(checkpoint), str(file)]) == 2
        assert f"features of the ONNX file differ by {difference:.1e}; 1.0e-04 is accepted" in capsys.readouterr().err
        assert not file.exists()


@needs_onnx
def test_a_fixed_batch_is_refused(tmp_path):
    class Fixed(torch.nn.Module):
        dim = 3

        def forward(self, images):
            class Out:
                feats = images.mean((2, 3)) + torch.zeros(len(images), 3)

            return Out

    extractor = FeatureExtractor(Fixed(), (8, 8), device="cpu")
    export.export(extractor, tmp_path / "fixed.onnx", 18)
    with pytest.raises(RuntimeError, match=r"fixes the batch at 2 images.*write tensor\.shape\[0\]"):
        export.largest_difference(extractor, tmp_path / "fixed.onnx")


def test_the_file_lies_beside_the_checkpoint_unless_named(checkpoint, monkeypatch):
    monkeypatch.setattr(export, "require_onnx", lambda: None)
    monkeypatch.setattr(export, "export", lambda extractor, output, opset: output.write_text("features"))
    monkeypatch.setattr(export, "largest_difference", lambda *_: 0.0)
    assert export.main([str(checkpoint)]) == 0
    assert {file.name for file in checkpoint.parent.iterdir()} == {"checkpoint.pth", "encoder.onnx", "encoder.json"}


def test_an_encoder_of_the_hub_needs_a_file_to_be_named(monkeypatch, capsys):
    monkeypatch.setattr(export, "require_onnx", lambda: None)
    assert export.main(["hub:me/animals"]) == 2
    assert "no file to write is named, and hub:me/animals has no folder here" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnx" else object())
    assert export.main([str(tmp_path), "x.onnx"]) == 2
    assert "export: onnx is not installed" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-m", "fastreid_uns.commands", "export", "--help"], capture_output=True, text=True
    )
    assert "OUTPUT_DIR of a run" in " ".join(done.stdout.split())
    code = "import sys, fastreid_uns.commands.export; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
