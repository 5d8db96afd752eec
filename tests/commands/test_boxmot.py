"""Exported files in BoxMOT's ReID backend, in a process of its own: nothing of ours imports BoxMOT, which is AGPL."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastreid_uns.commands import export
from fastreid_uns.config import load_config
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.predictor import FeatureExtractor

PYTHON = os.environ.get("BOXMOT_PYTHON", sys.executable)
SCRIPT = Path(__file__).with_name("boxmot_features.py")
HEIGHT, WIDTH = 64, 32
CROPS = 6

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def boxmot() -> str:
    """The version of BoxMOT; without it the tests are skipped."""
    ask = "from importlib.metadata import version; print(version('boxmot'))"
    done = subprocess.run([PYTHON, "-c", ask], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("needs BoxMOT: pip install boxmot into an environment, and set BOXMOT_PYTHON to its python")
    if importlib.util.find_spec("onnxscript") is None or importlib.util.find_spec("onnx") is None:
        pytest.skip("needs the packages of the extra export")
    return done.stdout.strip()


def run_of(folder: Path, mean: list[float], std: list[float]) -> Path:
    """A folder with a checkpoint of a small network, the fitted whitening of which makes its features differ."""
    keys = [f"INPUT.SIZE=[{HEIGHT}, {WIDTH}]", f"INPUT.MEAN={mean}", f"INPUT.STD={std}", "MODEL.MEMORY.NAME="]
    keys += ["MODEL.BACKBONE.NAME=SmallNet", "MODEL.HEAD.NAME=PooledHead", "MODEL.HEAD.DIM=32"]
    cfg = load_config(None, [*keys, "MODEL.LOSSES.contrast=null"])
    torch.manual_seed(1)
    model = build_model(cfg, 4).eval()
    with torch.no_grad():
        pooled = model.encoder(torch.from_numpy(pictures(80, seed=7)).permute(0, 3, 1, 2)).pooled
        model.encoder.head.whitening.fit(pooled.unflatten(0, (40, 2)))
    content = {"model": model.state_dict(), "config": cfg.dump(), "num_images": 4}
    torch.save(content, folder / "checkpoint_0001.pth")
    (folder / "last").write_text("checkpoint_0001.pth\n")
    return folder


def pictures(count: int, seed: int) -> np.ndarray:
    """(B,H,W,3) uint8 RGB: smooth, each of colours of its own."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (count, HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


def boxmot_features(file: Path, crops: np.ndarray, folder: Path) -> np.ndarray:
    """(B,D) of crops that are side by side in one frame, BGR as OpenCV reads it."""
    frame = np.concatenate(list(crops), axis=1)[..., ::-1]
    boxes = [(WIDTH * place, 0, WIDTH * (place + 1), HEIGHT) for place in range(len(crops))]
    np.savez(folder / "crops.npz", image=frame, boxes=np.array(boxes, np.float32))
    command = [PYTHON, str(SCRIPT), str(file), str(folder / "crops.npz"), str(folder / "features.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "features.npy")


def cosines(run: Path, normalisation: str, folder: Path) -> np.ndarray:
    """(B,) between what BoxMOT makes of an exported file and what our extractor gives, for equal crops."""
    file = folder / "encoder.onnx"
    assert export.main([str(run), str(file), "--normalisation", normalisation]) == 0
    crops = pictures(CROPS, seed=0)
    found = boxmot_features(file, crops, folder)
    expected = FeatureExtractor.from_checkpoint(run, device="cpu")(list(crops)).numpy()
    assert found.shape == expected.shape
    return (found * expected).sum(axis=1)


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])  # of EfficientNet-Lite


@pytest.mark.parametrize(
    ("numbers", "normalisation"), [(IMAGENET, "outside"), (IMAGENET, "imagenet"), (HALF, "imagenet")]
)
def test_boxmot_gives_our_features(tmp_path, numbers, normalisation):
    assert cosines(run_of(tmp_path, *numbers), normalisation, tmp_path).min() > 0.999


@pytest.mark.parametrize(("numbers", "normalisation"), [(IMAGENET, "inside"), (HALF, "inside"), (HALF, "outside")])
def test_the_wrong_form_gives_other_features(tmp_path, numbers, normalisation):
    """Why there is an option: nothing fails, and the features are wrong."""
    assert cosines(run_of(tmp_path, *numbers), normalisation, tmp_path).max() < 0.95
