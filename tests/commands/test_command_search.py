from __future__ import annotations

import json
import shutil
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


def test_an_index_outlives_the_weights_that_made_it(place, capsys, tmp_path):
    weights = write_checkpoint(tmp_path / "going.pth", 1)
    index = tmp_path / "index"
    arguments = ["build", place / "gallery", index, "--weights", weights, "--device", "cpu"]
    assert search.main([*map(str, arguments)]) == 0
    weights.unlink()
    image = place / "gallery" / "camera0" / "2 <&>.png"
    capsys.readouterr()
    assert search.main(["query", str(index), str(image), "--device", "cpu", "--top", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split(maxsplit=2) == ["1", "1.0000", str(image)]


def test_an_index_is_overwritten_only_where_that_is_said(place, capsys):
    arguments = ["build", place / "gallery", place / "index", "--weights", place / "run.pth", "--device", "cpu"]
    before = (place / "index").read_bytes()
    assert search.main([*map(str, arguments)]) == 2
    assert "say --overwrite" in capsys.readouterr().err
    assert search.main([*map(str, arguments), "--overwrite"]) == 0
    assert (place / "index").read_bytes() == before


def test_several_queries_as_json(place, capsys):
    images = [str(place / "gallery" / f"camera{i % 2}" / f"{i} <&>.png") for i in (3, 8)]
    (place / "index.html").unlink(missing_ok=True)
    arguments = ["query", str(place / "index"), *images, "--json", "--top", "2", "--device", "cpu"]
    assert search.main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["query"] for line in lines] == images
    assert [line["nearest"][0]["image"] for line in lines] == images
    assert all(len(line["nearest"]) == 2 and line["nearest"][0]["similarity"] > 0.9999 for line in lines)
    assert not (place / "index.html").exists()


def test_images_are_added_and_removed(place, capsys, tmp_path):
    index, more = tmp_path / "index", tmp_path / "more"
    shutil.copy(place / "index", index)
    more.mkdir()
    Image.new("RGB", (20, 40), "red").save(more / "red.png")
    own = place / "gallery" / "camera1"

    def say(*arguments):
        code = search.main([*map(str, arguments)])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    cpu = ("--device", "cpu")
    assert "1 images added, 5 were in it; it has 11 now" in say("add", index, more, own, *cpu)[1]
    (more / "red.png").rename(tmp_path / "moved.png")
    found = say("query", index, tmp_path / "moved.png", "--json", "--top", 1, *cpu)[1]
    assert json.loads(found)["nearest"][0]["image"] == str(more / "red.png")
    assert "1 images removed; it has 10 now" in say("remove", index, more / "red.png")[1]
    assert "5 images removed; it has 5 now" in say("remove", index, own)[1]
    code, text = say("remove", index, own)
    assert code == 2
    assert "is not in it" in text


def test_errors_are_one_line(place, capsys, tmp_path):
    image = place / "gallery" / "camera0" / "0 <&>.png"
    save_file({"feats": torch.zeros(1)}, tmp_path / "tensors")
    (tmp_path / "text").write_text("no index")
    for arguments, message in (
        (["query", tmp_path / "none", image], "no index was found"),
        (["query", tmp_path / "text", image], "cannot be read as an index"),
        (["query", tmp_path / "tensors", image], "cannot be read as an index"),
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


def test_help_loads_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-m", "fastreid_uns.commands", "search", "query", "--help"], capture_output=True, text=True
    )
    assert "file that build or group wrote" in done.stdout
    code = "import sys, fastreid_uns.commands.search; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "False"
