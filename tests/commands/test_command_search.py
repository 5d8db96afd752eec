from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastreid_uns.commands import search
from fastreid_uns.config import load_config
from fastreid_uns.modeling.meta_arch import build_model


def write_checkpoint(file, seed):
    cfg = load_config(None, ["INPUT.SIZE=[32, 16]", "MODEL.BACKBONE.NAME=SmallNet", "MODEL.BACKBONE.WIDTH=8"])
    torch.manual_seed(seed)
    torch.save({"model": build_model(cfg, 5).state_dict(), "config": cfg.dump(), "num_images": 5}, file)
    return file


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a checkpoint, a gallery of ten pictures, and an index of it."""
    place = tmp_path_factory.mktemp("search")
    write_checkpoint(place / "run.pth", 0)
    random = np.random.default_rng(0)
    for i in range(10):
        file = place / "gallery" / f"camera{i % 2}" / f"{i} <&>.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 20, 3), dtype=np.uint8)).save(file)
    arguments = ["build", place / "gallery", place / "index", "--weights", place / "run.pth", "--workers", "0"]
    assert search.main([*map(str, arguments), "--device", "cpu"]) == 0
    return place


def query(place, image, *options):
    return search.main(["query", str(place / "index"), str(image), "--device", "cpu", *map(str, options)])


def test_an_image_finds_itself_first(place, capsys, tmp_path):
    image = place / "gallery" / "camera1" / "7 <&>.png"
    page = tmp_path / "deeper" / "found.html"
    assert query(place, image, "--top", 3, "--html", page) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split(maxsplit=2) == ["1", "1.0000", str(image)]
    assert [line.split()[0] for line in lines[:-1]] == ["1", "2", "3"]
    assert lines[-1] == str(page)
    text = page.read_text()
    assert text.count("<img") == 4  # query and three results, in the page itself
    assert text.count("data:image/jpeg;base64,") == 4
    assert "7 &lt;&amp;&gt;.png" in text
    assert "<&>" not in text


def test_order_is_that_of_the_similarities(place, capsys):
    from fastreid_uns.predictor import FeatureExtractor

    extractor = FeatureExtractor.from_checkpoint(place / "run.pth", device="cpu")
    files = sorted(str(file) for file in (place / "gallery").rglob("*.png"))
    similarity = extractor(files) @ extractor(files[4])[0]
    expected = [files[i] for i in np.argsort(-similarity.numpy(), kind="stable")]
    assert query(place, files[4], "--top", 99) == 0  # more than there are
    lines = capsys.readouterr().out.splitlines()[:-1]
    assert [line.split(maxsplit=2)[2] for line in lines] == expected
    assert (place / "index.html").is_file()


def test_other_weights_are_refused(place, capsys, tmp_path):
    other = write_checkpoint(tmp_path / "other.pth", 1)
    assert query(place, place / "gallery" / "camera0" / "0 <&>.png", "--weights", other) == 2
    assert "the index was built with other weights" in capsys.readouterr().err


def test_errors_are_one_line(place, capsys, tmp_path):
    image = place / "gallery" / "camera0" / "0 <&>.png"
    save_file({"feats": torch.zeros(1)}, tmp_path / "tensors")
    (tmp_path / "text").write_text("no index")
    for arguments, message in (
        (["query", tmp_path / "none", image], "no such index. Make it with search.py build"),
        (["query", tmp_path / "text", image], "the file is no index"),
        (["query", tmp_path / "tensors", image], "holds tensors but is no index"),
        (["query", place / "index", tmp_path / "none.jpg"], "no such image"),
        (["query", place / "index", image, "--top", "0"], "at least one image must be shown"),
        (["build", tmp_path / "none", "x", "--weights", place / "run.pth"], "no such folder"),
        (["build", tmp_path, "x", "--weights", place / "run.pth"], "there is no image below this folder"),
        (["build", place / "gallery", "x", "--weights", tmp_path], "no checkpoint was found"),
    ):
        assert search.main([*map(str, arguments), "--device", "cpu"]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert message in printed
        assert printed.count("\n") == 1


@pytest.mark.parametrize("feats", [torch.zeros(0, 8), torch.full((2, 8), torch.nan), torch.full((2, 8), torch.inf)])
def test_an_index_without_sound_features_is_refused(place, capsys, tmp_path, feats):
    save_file({"feats": feats}, tmp_path / "index", metadata={"index": "{}"})
    image = place / "gallery" / "camera0" / "0 <&>.png"
    assert search.main(["query", str(tmp_path / "index"), str(image), "--device", "cpu"]) == 2
    assert "are empty or not all finite" in capsys.readouterr().err


def test_help_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-m", "fastreid_uns.commands", "search", "query", "--help"], capture_output=True, text=True
    )
    assert "file that build wrote" in done.stdout
    code = "import sys, fastreid_uns.commands.search; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
