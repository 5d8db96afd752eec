"""What `group` leaves is of use elsewhere: as ONNX, as a shared encoder, and over HTTP by `serve`."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns.commands import export
from fastreid_uns.photos.known import Known
from fastreid_uns.photos.road import group_photos
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.predictor import FeatureExtractor

INDIVIDUALS, EACH = 6, 5
SMALL = "MODEL: {BACKBONE: {NAME: SmallNet}}\nINPUT: {MEAN: [0.5, 0.5, 0.5], STD: [0.5, 0.5, 0.5]}\n"


@pytest.fixture(scope="module")
def photo_run(pictures, tmp_path_factory) -> Path:
    """The folder of a small run without training: six individuals, five photos of each in another light."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "small.yaml").write_text(SMALL)
    (folder / "photos").mkdir()
    for one, picture in enumerate(pictures(INDIVIDUALS, 5)):
        for number in range(EACH):
            light = 0.8 + 0.1 * number
            Image.fromarray(np.uint8(np.clip(picture * light, 0, 255))).save(folder / f"photos/{one}_{number}.png")
    wishes = {"size": (64, 32), "training": False, "config_file": str(folder / "small.yaml")}
    group_photos(folder / "photos", folder / "out", **wishes)
    return folder / "out"


def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 32, generator=torch.Generator().manual_seed(4))


def test_its_encoder_is_shared_with_the_whitening(photo_run, tmp_path):
    extractor = FeatureExtractor.from_checkpoint(photo_run, device="cpu")
    assert extractor.encoder.head.whitening.mean.abs().max() > 0, "the whitening of a new head has the mean 0"
    extractor.save_pretrained(tmp_path / "shared")
    again = FeatureExtractor.from_pretrained(tmp_path / "shared", device="cpu")
    assert torch.equal(again(images()), extractor(images()))


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the packages of the extra export",
)
def test_its_encoder_is_exported_for_trackers(photo_run, tmp_path):
    import onnxruntime

    file = tmp_path / "tracker.onnx"
    assert export.main([str(photo_run), str(file), "--normalisation", "imagenet"]) == 0
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    (found,) = onnxruntime.InferenceSession(str(file)).run(None, {"images": ((images() - mean) / std).numpy()})
    expected = FeatureExtractor.from_checkpoint(photo_run, device="cpu")(images())
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_serve_answers_who_is_on_a_photo(photo_run):
    pytest.importorskip("starlette", reason="needs the extra `review`")
    httpx = pytest.importorskip("httpx", reason="needs httpx")
    command = [sys.executable, "-u", "-m", "fastreid_uns.commands", "serve", str(photo_run)]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=environment) as process:
        try:
            address = process.stdout.readline().strip()
            token = address.rstrip("/").rpartition("/")[2]
            photo = photo_run.parent / "photos/3_2.png"
            url, headers = address.replace(f"{token}/", "identify"), {"X-Token": token}
            answer = httpx.post(url, content=photo.read_bytes(), headers=headers, timeout=60).json()
            refused = httpx.post(url, content=b"<html>", headers=headers, timeout=60)
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert (photo_run / f"groups/{answer['group']:04d}" / "3_2.png").exists()
    assert answer["answer"] == "unsure", "nobody has answered the questions of the audit"
    assert answer == Known(PhotoRun(photo_run)).identify_bytes(photo.read_bytes())
    assert refused.status_code == 400
    assert "web page" in refused.json()["error"]
