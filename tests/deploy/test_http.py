"""`identify` over HTTP as programs of others call it: httpx and the curl line of DEPLOY.md, against a real server."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("httpx", reason="needs httpx")
pytest.importorskip("starlette", reason="needs the extra `review`")

import httpx

from fastreid_uns.photos.identify import Thresholds, identify
from fastreid_uns.photos.members import Member
from fastreid_uns.photos.review import Review
from fastreid_uns.photos.server import Server
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.predictor import FeatureExtractor

PAGE = Path(__file__).parents[2] / "DEPLOY.md"
THRESHOLDS = Thresholds(known=0.9, new=0.5)


@pytest.fixture
def photos(pictures, tmp_path) -> list[Path]:
    """Two photos of each of two individuals, one of them darker; and one of a third individual."""
    first, second, third = pictures(3, 11)
    shown = [first, first * 0.9, second, second * 0.9, third]
    files = [tmp_path / "photos" / f"{number}.png" for number in range(len(shown))]
    files[0].parent.mkdir()
    for file, picture in zip(files, shown, strict=True):
        Image.fromarray(np.uint8(picture)).save(file)
    return files


@pytest.fixture
def server(photos, make_run, tmp_path) -> Iterator[Server]:
    """A server that knows two individuals."""
    run = PhotoRun.create(tmp_path / "out", tmp_path / "photos")
    run.write_groups(
        [Member(file.name, group, 0.9, None, None) for file, group in zip(photos[:4], (1, 1, 2, 2), strict=True)]
    )
    extractor = FeatureExtractor.from_checkpoint(make_run(tmp_path), device="cpu")
    known, groups = extractor(photos[:4]), torch.tensor([1, 1, 2, 2])

    def answer(content: bytes) -> dict:
        (found,) = identify(extractor([content]), known, groups, THRESHOLDS, precision=1.0)
        return {"answer": found.kind, "group": found.group, "similarity": found.similarity}

    server = Server(Review(run), answer)
    thread = threading.Thread(target=server.run)
    thread.start()
    yield server
    server.stop()
    thread.join(20)
    assert not thread.is_alive()


def test_httpx(server, photos):
    headers = {"X-Token": server.token}
    with httpx.Client(base_url=server.address.removesuffix(f"{server.token}/"), headers=headers) as client:
        known = client.post("/identify", content=photos[3].read_bytes())
        assert known.status_code == 200
        assert known.headers["content-type"] == "application/json"
        assert (known.json()["answer"], known.json()["group"]) == ("known", 2)
        assert known.json()["similarity"] == pytest.approx(1, abs=1e-5)
        assert client.post("/identify", content=photos[4].read_bytes()).json()["answer"] != "known"
        wrong = client.post("/identify", content=b"<html>")
        assert wrong.status_code == 400
        assert "web page" in wrong.json()["error"]
        assert client.post("/identify", content=b"x", headers={"X-Token": "guessed"}).status_code == 403


def test_the_documented_curl_line(server, photos):
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    (line,) = re.findall(r"^curl .*identify$", PAGE.read_text(), re.MULTILINE)
    address = server.address.removesuffix(f"/{server.token}/")
    for shown, real in (("http://127.0.0.1:8000", address), ("TOKEN", server.token), ("photo.jpg", photos[0].name)):
        assert shown in line
        line = line.replace(shown, real)
    words = [curl, "--silent", "--fail", *shlex.split(line)[1:]]
    done = subprocess.run(words, capture_output=True, cwd=photos[0].parent, timeout=30, check=True)
    answer = json.loads(done.stdout)
    assert (answer["answer"], answer["group"]) == ("known", 1)
