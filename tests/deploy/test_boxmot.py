"""Exported files in BoxMOT's ReID backend, in a process of its own: nothing of ours imports BoxMOT, which is AGPL."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastreid_uns.commands import export
from fastreid_uns.predictor import FeatureExtractor

PYTHON = os.environ.get("BOXMOT_PYTHON", sys.executable)
SCRIPT = Path(__file__).with_name("boxmot_features.py")
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


def boxmot_features(file: Path, crops: np.ndarray, folder: Path) -> np.ndarray:
    """(B,D) of crops that are side by side in one frame, BGR as OpenCV reads it."""
    frame = np.concatenate(list(crops), axis=1)[..., ::-1]
    height, width = crops.shape[1:3]
    boxes = [(width * place, 0, width * (place + 1), height) for place in range(len(crops))]
    np.savez(folder / "crops.npz", image=frame, boxes=np.array(boxes, np.float32))
    command = [PYTHON, str(SCRIPT), str(file), str(folder / "crops.npz"), str(folder / "features.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return np.load(folder / "features.npy")


@pytest.fixture
def cosines(make_run, pictures, tmp_path):
    """(numbers, normalisation) → (B,) between what BoxMOT makes of an exported file and what our extractor gives."""

    def between(numbers, normalisation: str) -> np.ndarray:
        run, file = make_run(tmp_path, *numbers), tmp_path / "encoder.onnx"
        assert export.main([str(run), str(file), "--normalisation", normalisation]) == 0
        crops = pictures(CROPS, 0)
        found = boxmot_features(file, crops, tmp_path)
        expected = FeatureExtractor.from_checkpoint(run, device="cpu")(list(crops)).numpy()
        assert found.shape == expected.shape
        return (found * expected).sum(axis=1)

    return between


IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])  # of EfficientNet-Lite
RIGHT = [(IMAGENET, "outside"), (IMAGENET, "imagenet"), (HALF, "imagenet")]
WRONG = [(IMAGENET, "inside"), (HALF, "inside"), (HALF, "outside")]


@pytest.mark.parametrize(("numbers", "normalisation"), RIGHT)
def test_boxmot_gives_our_features(cosines, numbers, normalisation):
    assert cosines(numbers, normalisation).min() > 0.999


@pytest.mark.parametrize(("numbers", "normalisation"), WRONG)
def test_the_wrong_form_gives_other_features(cosines, numbers, normalisation):
    """Why there is an option: BoxMOT takes the file without a word, and the features are wrong."""
    assert cosines(numbers, normalisation).max() < 0.99
