"""The data checker on small trees of real images, with each number worked by hand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from fastreid_uns.commands import check as command

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    return command


@pytest.fixture
def check(tool, capsys):
    """Runs the tool; gives its exit status and its output with runs of spaces made one."""

    def run(*arguments: object) -> tuple[int, str]:
        status = tool.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        lines = (captured.out + captured.err).splitlines()
        return status, "\n".join(" ".join(line.split()) for line in lines)

    return run


def draw(path: Path, size: tuple[int, int] = (4, 8), colour: tuple[int, int, int] = (0, 0, 0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def market(tmp_path) -> Path:
    draw(tmp_path / "bounding_box_train/0002_c1s1_000451_03.jpg", (4, 8), (10, 0, 0))
    draw(tmp_path / "bounding_box_train/0002_c2s1_000451_03.jpg", (6, 12), (0, 10, 0))
    draw(tmp_path / "bounding_box_train/0007_c1s1_000451_03.jpg", (5, 20), (0, 0, 10))
    draw(tmp_path / "query/0003_c2s1_000301_00.jpg", (4, 8), (50, 0, 0))
    draw(tmp_path / "query/0004_c2s1_000301_00.jpg", (4, 8), (0, 50, 0))
    draw(tmp_path / "bounding_box_test/0003_c5s1_000001_01.jpg", (4, 8), (0, 0, 50))
    draw(tmp_path / "bounding_box_test/0004_c2s1_000001_01.jpg", (4, 8), (99, 0, 0))
    return tmp_path


def test_sound_set(check, market):
    status, output = check("market1501", "--root", market)
    assert status == 0
    assert "bounding_box_train train 3\n" in output
    assert "train 3 12,936 2 751 2\n" in output
    assert "query 2 3,368 2 750 1\n" in output
    assert "gallery 2 15,913 2 751 2\n" in output
    # cameras are counted from 0; identities of camera 1: 2 in training, 3 and 4 in query and gallery
    assert "\n0 2 0 0 2\n" in output
    assert "\n1 1 2 1 3\n" in output
    assert "\n4 0 0 1 1\n" in output
    # identity 4 is in the gallery under its own camera only
    assert "1 of 2 queries have no match in the gallery under protocol cross_camera" in output
    assert "width 4 4 6\n" in output
    assert "height 8 8 20\n" in output
    assert "0 files occur more than once; 0 of them in training and in a test split" in output
    assert output.endswith("0 of 7 images are missing or unreadable")


def test_every_unreadable_image_is_listed(check, market):
    truncated = market / "query/0003_c2s1_000301_00.jpg"
    Image.effect_noise((64, 64), 90).convert("RGB").save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-600])
    empty = market / "bounding_box_test/0003_c5s1_000001_01.jpg"
    empty.write_bytes(b"")
    status, output = check("market1501", "--root", market)
    assert status == 1
    assert "2 of 7 images are missing or unreadable:" in output
    listed = {line.split(":")[0] for line in output.splitlines()[-2:]}
    assert listed == {str(truncated), str(empty)}


def test_quick_opens_nothing_but_finds_missing_files(check, tmp_path):
    for name, lines in {
        "train": ["0000/0000_000_01_a.jpg 0", "0000/0000_001_02_a.jpg 0"],
        "val": ["0001/0001_000_03_a.jpg 1"],
        "query": ["0000/0000_000_04_a.jpg 0"],
        "gallery": ["0000/0000_001_05_a.jpg 0"],
    }.items():
        (tmp_path / f"list_{name}.txt").write_text("".join(f"{line}\n" for line in lines))
        for line in lines:
            image = tmp_path / ("train" if name in ("train", "val") else "test") / line.split()[0]
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes(b"no image")
    lost = tmp_path / "train/0000/0000_001_02_a.jpg"
    lost.unlink()
    status, output = check("msmt17", "--root", tmp_path, "--quick")
    assert status == 1
    assert output.endswith(f"1 of 5 images are missing:\n{lost}: missing")
    assert "train 3 32,621 2 1,041 3\n" in output
    assert "Sizes" not in output


def test_equal_files_in_training_and_test_are_shown(check, market):
    train, gallery = "bounding_box_train/0002_c1s1_000451_03.jpg", "bounding_box_test/0003_c5s1_000001_01.jpg"
    (market / gallery).write_bytes((market / train).read_bytes())
    status, output = check("market1501", "--root", market)
    assert status == 0
    assert "1 files occur more than once; 1 of them in training and in a test split" in output
    assert f"{market / train} (train), {market / gallery} (gallery)" in output


def test_path_in_two_splits_is_shown(check, tmp_path):
    image = draw(tmp_path / "a.png")
    (tmp_path / "m.csv").write_text("path,identity,split\na.png,1,train\na.png,1,query\na.png,1,gallery\n")
    status, output = check("csv_file", "PATH", tmp_path / "m.csv")
    assert status == 0
    assert "protocol plain" in output
    assert f"{image} (gallery+query+train)" in output
    assert "\nunknown 1 1 1 1\n" in output


def test_relative_and_absolute_paths_in_one_manifest(check, tmp_path, monkeypatch):
    draw(tmp_path / "here/a.png")
    other = draw(tmp_path / "there/b.png", colour=(9, 9, 9))
    (tmp_path / "m.csv").write_text(f"path,split\nhere/a.png,train\n{other},train\n")
    monkeypatch.chdir(tmp_path)
    status, output = check("csv_file", "PATH", "m.csv")
    assert status == 0
    assert f"images lie in {tmp_path}; protocol plain" in output
    assert "\nhere train 1\nthere train 1\n" in output


def test_queries_in_their_own_gallery_are_counted(check, tmp_path):
    for name in ("a", "b", "c"):
        draw(tmp_path / f"{name}.png", colour=(ord(name), 0, 0))
    (tmp_path / "copy.png").write_bytes((tmp_path / "b.png").read_bytes())
    rows = ["a.png,1,query", "b.png,2,query", "c.png,1,query", "a.png,1,gallery", "copy.png,2,gallery"]
    (tmp_path / "m.csv").write_text("\n".join(["path,identity,split", *rows]))
    assert "2 of 3 queries are in the gallery themselves" in check("csv_file", "PATH", tmp_path / "m.csv")[1]
    assert "1 of 3 queries are in the gallery themselves" in check("csv_file", "PATH", tmp_path / "m.csv", "--quick")[1]


def test_what_is_passed_over_is_counted_and_no_pipe_is_opened(check, tmp_path, caplog):
    draw(tmp_path / "a.jpg")
    for name in ("b.heic", "c.HEIC", "d.txt"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "e.jpg")
    status, output = check("folder", "--root", tmp_path)
    assert status == 0
    assert "4 passed over: 2 .heic, 1 .txt, 1 pipe, socket or device." in caplog.text
    (tmp_path / "m.csv").write_text("path,split\na.jpg,train\ne.jpg,train\n")
    status, output = check("csv_file", "PATH", tmp_path / "m.csv")
    assert status == 2
    assert "line 3: there is no image" in output


def test_names_that_are_no_text_are_printed(check, tmp_path):
    draw(tmp_path / "a.jpg")
    name = os.fsdecode(b"\xff\xfe.jpg")
    (tmp_path / name).write_bytes(b"")
    status, output = check("folder", "--root", tmp_path)
    assert status == 1
    assert r"\xff\xfe.jpg: the file is empty" in output


def test_unlabelled_folder(check, tmp_path):
    for name in range(15):
        draw(tmp_path / f"{name:02d}/x.png", colour=(name, 0, 0))
    status, output = check("folder", "ROOT", tmp_path)
    assert status == 0
    assert "\n11 train 1\n3 more 3\n" in output
    assert "train 15 - 0 - 0\n" in output
    assert "queries" not in output


def test_keys_take_the_type_of_the_signature(tool, tmp_path):
    import fastreid_uns.data.datasets.vehicleid  # noqa: F401

    assert tool.keywords("vehicleid", ["SIZE", "1600", "ROOT", "2024"], None) == {"size": 1600, "root": "2024"}
    assert tool.keywords("vehicleid", [], "here") == {"root": "here"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["market1501", "--root", "nowhere"], "nowhere: there is no such folder; ROOT names the folder"),
        (["market150"], "'market150' is unknown; did you mean market1501?"),
        (["market1501", "ROUTE", "x"], "market1501: unknown key ROUTE; did you mean ROOT?"),
        (["market1501", "ROOT"], "market1501: key ROOT has no value; give KEY VALUE pairs."),
        (["csv_file"], "csv_file: PATH must be given; write PATH VALUE behind the name."),
        (["vehicleid", "SIZE", "7"], "vehicleid: SIZE is 7; accepted are 800, 1600, 2400."),
        (
            ["vehicleid", "SIZE", "{"],
            "vehicleid: SIZE is '{', text; a whole number such as 800 is accepted. Change the value.",
        ),
    ],
)
def test_what_cannot_be_loaded(check, arguments, message):
    status, output = check(*arguments)
    assert status == 2
    assert message in output


def test_data_set_of_a_plugin(check, tmp_path):
    image = draw(tmp_path / "x.png")
    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(
        "from fastreid_uns.registry import DATASET_REGISTRY\n"
        "from fastreid_uns.structures import Record, ReIDData\n"
        "@DATASET_REGISTRY.register()\n"
        "def one_of_a_plugin(*, copies: int = 1):\n"
        f"    return ReIDData([Record({str(image)!r}, 3, 0)] * copies, [], [], 'plain')\n"
    )
    status, output = check("one_of_a_plugin", "COPIES", "2", "--plugins", plugin)
    assert status == 0
    assert "train 2 - 1 - 1\n" in output
