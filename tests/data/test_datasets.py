"""Each loader on a miniature tree of its layout, with the records written out by hand."""

from __future__ import annotations

import csv
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from fastreid_uns.data.datasets import (  # noqa: F401  (importing registers them)
    csv_file,
    cuhk03,
    folder,
    market1501,
    msmt17,
    personx,
    vehicleid,
    vehiclex,
    veri776,
    veriwild,
)
from fastreid_uns.data.datasets.layout import PublishedCounts, check_counts, count, known_counts
from fastreid_uns.errors import UserError
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import Record, ReIDData

CONFIGS = Path(__file__).parents[2] / "configs/datasets"
SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(path: Path, *lines: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def load(name: str, root: Path, **keys) -> ReIDData:
    return DATASET_REGISTRY.build({"NAME": name, "ROOT": str(root), **keys})


def short(records: list[Record], root: Path) -> list[tuple[str, int, int]]:
    return [(str(Path(record.path).relative_to(root)), record.identity, record.camera) for record in records]


# Market-1501 and the sets that share its form


def market(root: Path) -> None:
    touch(root, "bounding_box_train/0007_c6s3_077667_04.jpg", "bounding_box_train/0002_c1s1_000451_03.jpg")
    touch(root, "query/0003_c2s1_000301_00.jpg")
    touch(root, "bounding_box_test/0003_c5s1_000001_01.jpg", "bounding_box_test/0000_c3s1_000001_01.jpg")
    touch(root, "bounding_box_test/-1_c1s1_000401_03.jpg", "bounding_box_test/Thumbs.db", "readme.txt")


def test_market_sorts_drops_junk_and_keeps_distractors(tmp_path):
    market(tmp_path)
    data = load("market1501", tmp_path)
    assert short(data.train, tmp_path) == [
        ("bounding_box_train/0002_c1s1_000451_03.jpg", 2, 0),
        ("bounding_box_train/0007_c6s3_077667_04.jpg", 7, 5),
    ]
    assert short(data.query, tmp_path) == [("query/0003_c2s1_000301_00.jpg", 3, 1)]
    assert short(data.gallery, tmp_path) == [
        ("bounding_box_test/0000_c3s1_000001_01.jpg", 0, 2),
        ("bounding_box_test/0003_c5s1_000001_01.jpg", 3, 4),
    ]
    assert data.protocol == "cross_camera"


def test_missing_folder_says_what_is_there(tmp_path):
    touch(tmp_path, "train/x.jpg", "test/x.jpg", ".hidden")
    with pytest.raises(FileNotFoundError) as caught:
        load("market1501", tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: folder bounding_box_train, folder query, folder bounding_box_test are missing; "
        f"found: test, train. See datasets/README.md."
    )


def test_one_missing_folder_is_named_alone(tmp_path):
    touch(tmp_path, "query/x.jpg", "bounding_box_test/x.jpg")
    with pytest.raises(
        FileNotFoundError, match=r"folder bounding_box_train is missing; found: bounding_box_test, query\. See"
    ):
        load("market1501", tmp_path)


def test_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: there is no such folder; ROOT names the folder"):
        load("market1501", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["cat.jpg", "0002_s1_000451.jpg", "_c1s1.jpg"])
def test_name_that_does_not_parse(tmp_path, name):
    market(tmp_path)
    touch(tmp_path, f"bounding_box_train/{name}")
    with pytest.raises(ValueError, match=rf"bounding_box_train/{name}: .* such as 0002_c1s1_000451_03\.jpg"):
        load("market1501", tmp_path)


def test_camera_out_of_range(tmp_path):
    market(tmp_path)
    touch(tmp_path, "query/0003_c7s1_000301_00.jpg")
    with pytest.raises(ValueError, match=r"query/0003_c7s1_000301_00\.jpg: camera 7; .* are 1, 2, 3, 4, 5, 6\."):
        load("market1501", tmp_path)


def test_folder_without_images(tmp_path):
    market(tmp_path)
    (tmp_path / "query" / "0003_c2s1_000301_00.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"query: there is no image; accepted are .*\.jpg"):
        load("market1501", tmp_path)


def test_nothing_is_read_before_the_call():
    assert DATASET_REGISTRY.get("market1501") is market1501.market1501
    assert DATASET_REGISTRY.schema("market1501") == {"root": "datasets/Market-1501-v15.09.15"}


def test_veri776(tmp_path):
    touch(tmp_path, "image_train/0001_c020_00016450_0.jpg", "image_query/0002_c002_00030600_0.jpg")
    touch(tmp_path, "image_test/0002_c001_00030600_1.jpg")
    data = load("veri776", tmp_path)
    assert short(data.train, tmp_path) == [("image_train/0001_c020_00016450_0.jpg", 1, 19)]
    assert short(data.query, tmp_path) == [("image_query/0002_c002_00030600_0.jpg", 2, 1)]
    assert short(data.gallery, tmp_path) == [("image_test/0002_c001_00030600_1.jpg", 2, 0)]


def test_personx_renumbers_its_six_cameras(tmp_path):
    touch(tmp_path, *(f"bounding_box_train/0001_c{camera}_{camera}.jpg" for camera in (3, 4, 8, 10, 11, 12)))
    touch(tmp_path, "query/0002_c3_1.jpg", "bounding_box_test/0002_c12_1.jpg")
    data = load("personx", tmp_path)
    found = {int(Path(record.path).stem.split("_")[2]): record.camera for record in data.train}
    assert found == {3: 0, 4: 1, 8: 2, 10: 3, 11: 4, 12: 5}
    touch(tmp_path, "query/0002_c5_1.jpg")
    with pytest.raises(ValueError, match=r"0002_c5_1\.jpg: camera 5; the cameras of this set are 3, 4, 8, 10, 11, 12"):
        load("personx", tmp_path)


def test_vehiclex_is_for_training_only(tmp_path):
    touch(tmp_path, "image_train/0001_c006_1.jpg", "image_train/1362_c036_2.jpg", "image_train/0001_c016_3.jpg")
    data = load("vehiclex", tmp_path)
    assert short(data.train, tmp_path) == [
        ("image_train/0001_c006_1.jpg", 1, 0),
        ("image_train/0001_c016_3.jpg", 1, 1),
        ("image_train/1362_c036_2.jpg", 1362, 2),
    ]
    assert (data.query, data.gallery) == ([], [])
    touch(tmp_path, "sys_image_train_tr/0005_c001_1.jpg")
    assert [record.identity for record in load("vehiclex", tmp_path, FOLDER="sys_image_train_tr").train] == [5]


# MSMT17


def msmt(root: Path, train: str, test: str) -> None:
    images = {
        "train": ("0000/0000_000_01_0303morning_0015_0.jpg 0", "0001/0001_004_15_0303noon_0015_1.jpg 1"),
        "val": ("0001/0001_005_02_0303noon_0020_0.jpg 1",),
        "query": ("0000/0000_001_14_0302noon_0020_0.jpg 0",),
        "gallery": ("0000/0000_002_03_0302noon_0020_0.jpg 0",),
    }
    for part, lines in images.items():
        write(root / f"list_{part}.txt", *lines)
        touch(root / (train if part in ("train", "val") else test), *(line.split()[0] for line in lines))


@pytest.mark.parametrize(
    ("version", "train", "test"), [("V1", "train", "test"), ("V2", "mask_train_v2", "mask_test_v2")]
)
def test_msmt17_finds_its_version(tmp_path, caplog, version, train, test):
    msmt(tmp_path, train, test)
    with caplog.at_level(logging.INFO):
        data = load("msmt17", tmp_path)
    assert f"this is version {version} (folders {train}, {test})" in caplog.text
    assert short(data.train, tmp_path) == [
        (f"{train}/0000/0000_000_01_0303morning_0015_0.jpg", 0, 0),
        (f"{train}/0001/0001_004_15_0303noon_0015_1.jpg", 1, 14),
        (f"{train}/0001/0001_005_02_0303noon_0020_0.jpg", 1, 1),
    ]
    assert short(data.query, tmp_path) == [(f"{test}/0000/0000_001_14_0302noon_0020_0.jpg", 0, 13)]
    assert short(data.gallery, tmp_path) == [(f"{test}/0000/0000_002_03_0302noon_0020_0.jpg", 0, 2)]


def test_msmt17_with_both_versions_asks(tmp_path):
    msmt(tmp_path, "train", "test")
    msmt(tmp_path, "mask_train_v2", "mask_test_v2")
    with pytest.raises(ValueError, match="folders of V1 and of V2; set VERSION"):
        load("msmt17", tmp_path)
    assert "mask_train_v2" in load("msmt17", tmp_path, VERSION="V2").train[0].path


def test_msmt17_errors(tmp_path):
    with pytest.raises(ValueError, match=r"VERSION is 'V3'; accepted are auto, V1 and V2"):
        load("msmt17", tmp_path, VERSION="V3")
    msmt(tmp_path, "train", "test")
    write(tmp_path / "list_val.txt", "0001/0001_005_02_0303noon_0020_0.jpg 1", "", "0001/0001.jpg one")
    with pytest.raises(ValueError, match=r"list_val\.txt: line 3 is '0001/0001\.jpg one'; accepted is"):
        load("msmt17", tmp_path)
    write(tmp_path / "list_val.txt", "0001/0001_005_16_0303noon_0020_0.jpg 1")
    with pytest.raises(ValueError, match=r"list_val\.txt: 0001/0001_005_16_.*: camera 16"):
        load("msmt17", tmp_path)
    (tmp_path / "list_val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"file list_val\.txt is missing; found: list_gallery\.txt"):
        load("msmt17", tmp_path)


def test_lists_without_their_images_are_told_at_once(tmp_path):
    msmt(tmp_path, "train", "test")
    (tmp_path / "test/0000/0000_001_14_0302noon_0020_0.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"0000_001_14_.*: this image is missing although .*list_query\.txt"):
        load("msmt17", tmp_path)


# CUHK03


@pytest.mark.parametrize("variant", ["labeled", "detected"])
def test_cuhk03_in_folders(tmp_path, variant):
    touch(tmp_path / variant, "bounding_box_train/0001_c1_1.png", "bounding_box_train/0001_c2_6.png")
    touch(tmp_path / variant, "query/0003_c1_2.png", "bounding_box_test/0003_c2_7.png")
    data = load("cuhk03", tmp_path, VARIANT=variant)
    assert short(data.train, tmp_path) == [
        (f"{variant}/bounding_box_train/0001_c1_1.png", 1, 0),
        (f"{variant}/bounding_box_train/0001_c2_6.png", 1, 1),
    ]
    assert short(data.query, tmp_path) == [(f"{variant}/query/0003_c1_2.png", 3, 0)]
    assert short(data.gallery, tmp_path) == [(f"{variant}/bounding_box_test/0003_c2_7.png", 3, 1)]


def split_file(root: Path, variant: str, **fields) -> None:
    from scipy.io import savemat

    names = ["1_001_1_01.png", "1_001_2_06.png", "5_002_1_02.png", "5_002_2_07.png"]
    touch(root / f"images_{variant}", *names)
    content = {
        "filelist": np.array([[name] for name in names], dtype=object),
        "labels": np.array([[1], [1], [2], [2]]),
        "train_idx": np.array([[2], [1]]),
        "query_idx": np.array([[3]]),
        "gallery_idx": np.array([[4]]),
    }
    content.update(fields)
    savemat(root / f"cuhk03_new_protocol_config_{variant}.mat", {k: v for k, v in content.items() if v is not None})


def test_cuhk03_from_split_file(tmp_path):
    split_file(tmp_path, "labeled")
    data = load("cuhk03", tmp_path, VARIANT="labeled")
    assert short(data.train, tmp_path) == [
        ("images_labeled/1_001_2_06.png", 1, 1),
        ("images_labeled/1_001_1_01.png", 1, 0),
    ]
    assert short(data.query, tmp_path) == [("images_labeled/5_002_1_02.png", 2, 0)]
    assert short(data.gallery, tmp_path) == [("images_labeled/5_002_2_07.png", 2, 1)]


def test_cuhk03_errors(tmp_path):
    with pytest.raises(ValueError, match=r"VARIANT is 'drawn'; accepted are labeled and detected"):
        load("cuhk03", tmp_path, VARIANT="drawn")
    touch(tmp_path, "detected/query/0003_c1_2.png")
    with pytest.raises(
        FileNotFoundError, match=r"folder detected/bounding_box_train, .* are missing; found in detected: query\. See"
    ):
        load("cuhk03", tmp_path)
    split_file(tmp_path, "detected", query_idx=None)
    with pytest.raises(ValueError, match=r"_detected\.mat: field query_idx is missing; needed are train_idx"):
        load("cuhk03", tmp_path)
    split_file(tmp_path, "detected", filelist=np.array([["a.png"], ["b.png"], ["c.png"], ["d.png"]], dtype=object))
    with pytest.raises(ValueError, match=r"_detected\.mat: image 'a\.png' in filelist; .* such as 1_001_1_01\.png"):
        load("cuhk03", tmp_path)


@pytest.mark.parametrize("content", [b"", b"MATLAB 5.0", b"<html>not found</html>" * 20])
def test_cuhk03_with_a_broken_split_file(tmp_path, content):
    split_file(tmp_path, "detected")
    (tmp_path / "cuhk03_new_protocol_config_detected.mat").write_bytes(content)
    with pytest.raises(UserError, match=r"_detected\.mat: the file cannot be read as a \.mat file"):
        load("cuhk03", tmp_path)


# VehicleID, VERI-Wild


def vehicle_lists(root: Path, test: list[str]) -> None:
    write(root / "train_test_split/train_list.txt", "0000009 4", "0000003 2")
    write(root / "train_test_split/test_list_800.txt", *test)
    touch(root, *(f"image/{line.split()[0]}.jpg" for line in ["0000009", "0000003", *test]))


TEST_LIST = [f"{image:07d} {identity}" for identity in (70, 60, 80) for image in range(identity, identity + 5)]


def test_vehicleid_draws_one_gallery_image_of_each_identity(tmp_path):
    vehicle_lists(tmp_path, [*TEST_LIST, "0000099 90"])
    data = load("vehicleid", tmp_path)
    assert short(data.train, tmp_path) == [("image/0000009.jpg", 4, -1), ("image/0000003.jpg", 2, -1)]
    assert [record.identity for record in data.gallery] == [60, 70, 80, 90]
    assert short(data.gallery, tmp_path)[3] == ("image/0000099.jpg", 90, -1)  # the only one there is to draw
    drawn = {Path(record.path).stem for record in data.gallery}
    expected = [line.split()[0] for line in TEST_LIST if line.split()[0] not in drawn]
    assert [Path(record.path).stem for record in data.query] == expected
    assert len(expected) == 12
    assert data.protocol == "one_per_identity"


def test_vehicleid_seed_decides_the_gallery(tmp_path):
    vehicle_lists(tmp_path / "a", TEST_LIST)
    vehicle_lists(tmp_path / "b", TEST_LIST[::-1])
    galleries = [short(load("vehicleid", tmp_path / "a", SEED=seed).gallery, tmp_path / "a") for seed in range(8)]
    assert galleries[0] == short(load("vehicleid", tmp_path / "a", SEED=0).gallery, tmp_path / "a")
    assert galleries[0] == short(load("vehicleid", tmp_path / "b", SEED=0).gallery, tmp_path / "b")
    assert len({tuple(gallery) for gallery in galleries}) > 1


def test_vehicleid_errors(tmp_path):
    with pytest.raises(ValueError, match=r"SIZE is 900; accepted are 800, 1600, 2400"):
        load("vehicleid", tmp_path, SIZE=900)
    vehicle_lists(tmp_path, TEST_LIST)
    with pytest.raises(
        FileNotFoundError, match=r"file train_test_split/test_list_1600\.txt is missing; found in train_"
    ):
        load("vehicleid", tmp_path, SIZE=1600)
    write(tmp_path / "train_test_split/train_list.txt", "0000009")
    with pytest.raises(ValueError, match=r"train_list\.txt: line 1 is '0000009'; accepted is '0000001 2498'"):
        load("vehicleid", tmp_path)


def wild(root: Path, names: tuple[str, str, str], tail: str) -> None:
    listed = (["00010/000004", "00010/000005"], ["00007/000001"], ["00007/000002"])
    for name, lines in zip(names, listed, strict=True):
        write(root / "train_test_split" / name, *(line + tail for line in lines))
        touch(root / "images", *(f"{line}.jpg" for line in lines))
    write(
        root / "train_test_split/vehicle_info.txt",
        "id/image;Camera ID;Time;Model;Type;Color",
        "00007/000001;114;2018-03-11 00:00:43;a;b;c",
        "00007/000002;9;2018-03-11 00:00:43;a;b;c",
        "00010/000004;20;2018-03-11 00:00:43;a;b;c",
        "00010/000005;9;2018-03-11 00:00:43;a;b;c",
    )


@pytest.mark.parametrize(
    ("names", "tail"),
    [
        (("train_list.txt", "test_3000_query.txt", "test_3000.txt"), ""),
        (("train_list_start0.txt", "test_3000_id_query.txt", "test_3000_id.txt"), ".jpg 0 23"),
    ],
)
def test_veriwild_in_both_releases(tmp_path, names, tail):
    wild(tmp_path, names, tail)
    data = load("veriwild", tmp_path)
    assert short(data.train, tmp_path) == [("images/00010/000004.jpg", 10, 1), ("images/00010/000005.jpg", 10, 0)]
    assert short(data.query, tmp_path) == [("images/00007/000001.jpg", 7, 2)]
    assert short(data.gallery, tmp_path) == [("images/00007/000002.jpg", 7, 0)]


def test_veriwild_with_words_that_are_no_utf_8(tmp_path):
    wild(tmp_path, ("train_list.txt", "test_3000_query.txt", "test_3000.txt"), "")
    file = tmp_path / "train_test_split/vehicle_info.txt"
    file.write_bytes(file.read_bytes().replace(b";a;", b";\xb4\xf3\xd6\xda;"))
    assert [record.camera for record in load("veriwild", tmp_path).train] == [1, 0]


def test_veriwild_errors(tmp_path):
    with pytest.raises(ValueError, match="SIZE is 800; accepted are 3000, 5000, 10000"):
        load("veriwild", tmp_path, SIZE=800)
    wild(tmp_path, ("train_list.txt", "test_3000_query.txt", "test_3000.txt"), "")
    with pytest.raises(FileNotFoundError, match=r"test_5000_query\.txt, .*test_5000\.txt are missing"):
        load("veriwild", tmp_path, SIZE=5000)
    write(tmp_path / "train_test_split/train_list.txt", "00010/000006")
    with pytest.raises(ValueError, match=r"train_list\.txt: vehicle_info\.txt lacks 00010/000006"):
        load("veriwild", tmp_path)
    write(tmp_path / "train_test_split/vehicle_info.txt", "id/image;Camera ID", "00010/000004,114")
    with pytest.raises(ValueError, match=r"vehicle_info\.txt: line 2 is '00010/000004,114'"):
        load("veriwild", tmp_path)


# folder


def test_folder_takes_every_image_at_any_depth(tmp_path):
    touch(tmp_path, "b.JPG", "a/z.png", "a/deep/er/x.webp", "a/photo.Jpeg", "notes.txt", "a/noend", ".hidden.jpg")
    touch(tmp_path, ".cache/y.jpg", "__MACOSX/b.jpg", "a/__MACOSX/c.jpg", "album.jpg/inside.bmp", "0.tiff")
    data = load("folder", tmp_path)
    names = ["0.tiff", "a/deep/er/x.webp", "a/photo.Jpeg", "a/z.png", "album.jpg/inside.bmp", "b.JPG"]
    assert short(data.train, tmp_path) == [(name, -1, -1) for name in names]
    assert data[1:] == ([], [], "plain")


def test_folder_without_any_image(tmp_path):
    touch(tmp_path, "a/notes.txt", ".hidden.jpg")
    with pytest.raises(
        FileNotFoundError, match=r"no image below this folder; accepted are \.bmp, \.jfif, \.jpe, \.jpeg, \.jpg"
    ):
        load("folder", tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder; ROOT names"):
        load("folder", tmp_path / "nowhere")


def test_folder_lists_each_file_once_whatever_leads_to_it(tmp_path):
    touch(tmp_path / "root", *(f"d/a/{i}.jpg" for i in range(8)))
    touch(tmp_path / "elsewhere", "x.jpg")
    (tmp_path / "root/d/a/up").symlink_to("..")
    (tmp_path / "root/a").symlink_to("d")
    (tmp_path / "root/other").symlink_to(tmp_path / "elsewhere")
    found = short(load("folder", tmp_path / "root").train, tmp_path / "root")
    assert [name for name, *_ in found] == [*(f"d/a/{i}.jpg" for i in range(8)), "other/x.jpg"]


@pytest.mark.parametrize(("name", "level"), [("b.heic", "WARNING"), ("c.Txt", "INFO"), ("d", "INFO")])
def test_folder_says_what_it_passes_over(tmp_path, caplog, name, level):
    caplog.set_level(logging.INFO, logger="fastreid_uns")
    touch(tmp_path, "a.jpg", name)
    load("folder", tmp_path)
    kind = Path(name).suffix.lower() or "no extension"
    said = [record for record in caplog.records if f": 1 passed over: 1 {kind}." in record.getMessage()]
    assert [record.levelname for record in said] == [level]


# csv_file


def manifest(root: Path, *lines: str, header: str = "path,identity,camera,split", images: bool = True) -> str:
    column = header.split(",").index("path") if "path" in header.split(",") else 0
    if images:
        touch(root, *(cells[column] for cells in csv.reader(lines) if cells and cells[column]))
    return write(root / "manifest.csv", header, *lines)


def read(path: str, **keys) -> ReIDData:
    return DATASET_REGISTRY.build({"NAME": "csv_file", "PATH": path, **keys})


def test_csv_keeps_numbers_and_order(tmp_path):
    path = manifest(tmp_path, "t/b.png,7,3,train", "t/a.png,5,1,train", "q.png,9,0,query", "g.png,9,3,gallery")
    data = read(path)
    assert short(data.train, tmp_path) == [("t/b.png", 7, 3), ("t/a.png", 5, 1)]
    assert short(data.query, tmp_path) == [("q.png", 9, 0)]
    assert short(data.gallery, tmp_path) == [("g.png", 9, 3)]
    assert data.protocol == "cross_camera"


def test_csv_numbers_words_alike_in_all_splits(tmp_path):
    lines = ["1.png,rex,yard,train", "2.png,12,gate,train", "3.png,bo,gate,query", "4.png,bo,yard,gallery"]
    data = read(manifest(tmp_path, *lines, "5.png,rex,yard,gallery"))
    # sorted identities: 12, bo, rex; sorted cameras: gate, yard
    assert short(data.train, tmp_path) == [("1.png", 2, 1), ("2.png", 0, 0)]
    assert short(data.query, tmp_path) == [("3.png", 1, 0)]
    assert short(data.gallery, tmp_path) == [("4.png", 1, 1), ("5.png", 2, 1)]


def test_csv_without_labels(tmp_path):
    data = read(manifest(tmp_path, "train,a.png,x", "train,b.png,y", header="split,path,comment"))
    assert short(data.train, tmp_path) == [("a.png", -1, -1), ("b.png", -1, -1)]
    assert data[1:] == ([], [], "plain")


def test_csv_with_some_labels(tmp_path):
    data = read(manifest(tmp_path, "a.png,,2,train", "b.png,cat,,train", "c.png,-1,-1,train", "d.png,ape,1,train"))
    assert short(data.train, tmp_path) == [("a.png", -1, 2), ("b.png", 1, -1), ("c.png", -1, -1), ("d.png", 0, 1)]


def test_csv_drops_junk_from_the_test_part_only(tmp_path):
    lines = ["t.png,-1,0,train", "q.png,1,0,query", "j.png,-1,1,gallery", "g.png,1,1,gallery"]
    data = read(manifest(tmp_path, *lines))
    assert [record.identity for record in data.train] == [-1]
    assert short(data.gallery, tmp_path) == [("g.png", 1, 1)]


@pytest.mark.parametrize(
    ("query_camera", "gallery_camera", "asked", "expected"),
    [
        ("0", "1", "auto", "cross_camera"),
        ("0", "0", "auto", "plain"),
        ("", "1", "auto", "plain"),
        ("", "", "auto", "plain"),
        ("0", "1", "plain", "plain"),
        ("", "", "one_per_identity", "one_per_identity"),
        ("0", "0", "cross_camera", "cross_camera"),
    ],
)
def test_csv_protocol(tmp_path, query_camera, gallery_camera, asked, expected):
    path = manifest(tmp_path, f"q.png,1,{query_camera},query", f"g.png,1,{gallery_camera},gallery")
    assert read(path, PROTOCOL=asked).protocol == expected


def test_csv_reads_what_spreadsheets_write(tmp_path):
    touch(tmp_path, "a, b.png", "c.png")
    text = '\ufeffpath, identity ,camera,split\r\n"a, b.png",1,2,train\r\n\r\nc.png, 1 ,3, train\r\n'
    (tmp_path / "m.csv").write_bytes(text.encode("utf-8"))
    assert short(read(str(tmp_path / "m.csv")).train, tmp_path) == [("a, b.png", 1, 2), ("c.png", 1, 3)]


TABLE = [("path", "identity", "camera", "split"), ("t ä.png", 1, 2, "train"), ("u.png", 2, 1, "train")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_in_the_forms_of_spreadsheets(tmp_path, encoding, delimiter, end, caplog):
    touch(tmp_path, "t ä.png", "u.png")
    text = end.join(delimiter.join(map(str, row)) for row in TABLE) + end + delimiter * 3 + end
    (tmp_path / "m.csv").write_bytes(text.encode(encoding))
    assert short(read(str(tmp_path / "m.csv")).train, tmp_path) == [("t ä.png", 1, 2), ("u.png", 2, 1)]
    assert ("line 2 is not UTF-8; the file is read as Windows-1252" in caplog.text) == (encoding == "cp1252")


def test_csv_with_the_line_that_excel_writes(tmp_path):
    touch(tmp_path, "a.png", "b.png")
    (tmp_path / "m.csv").write_text(
        "sep=;\r\nPath;Identity;Camera;Split\r\na.png;-1,0;2,0;Train\r\nb.png;3,0;;train\r\n"
    )
    assert short(read(str(tmp_path / "m.csv")).train, tmp_path) == [("a.png", -1, 2), ("b.png", 3, -1)]


def test_csv_as_pandas_writes_it(tmp_path):
    """Columns with gaps are floating point there, and the index has no name."""
    lines = ["0,q.png,5.0,-1.0,query", "1,g.png,5.0,2.0,gallery", "2,j.png,-1.0,2.0,gallery", "3,t.png,NaN,,train"]
    data = read(manifest(tmp_path, *lines, header=",path,identity,camera,split"))
    assert short(data.query, tmp_path) == [("q.png", 5, -1)]
    assert short(data.gallery, tmp_path) == [("g.png", 5, 2)]  # without junk
    assert short(data.train, tmp_path) == [("t.png", -1, -1)]
    assert data.protocol == "plain"  # one camera is unknown
    with pytest.raises(ValueError, match=r"line 2 has no camera, which PROTOCOL cross_camera needs"):
        read(str(tmp_path / "manifest.csv"), PROTOCOL="cross_camera")


def test_csv_tells_1_from_01_but_not_from_1_0(tmp_path):
    lines = ["a.png,1,0,train", "b.png,01,0,train", "c.png,1.0,0,train", "d.png,2,0,train"]
    assert [record.identity for record in read(manifest(tmp_path, *lines)).train] == [1, 0, 1, 2]  # 01, 1, 2
    padded = ["a.png,0002,0,train", "b.png,0010,0,train"]
    assert [record.identity for record in read(manifest(tmp_path, *padded)).train] == [2, 10]


def test_csv_numbers_identities_that_fit_no_integer(tmp_path):
    lines = [f"a.png,{10**20},0,train", f"b.png,{10**20 + 1},0,train"]
    assert [record.identity for record in read(manifest(tmp_path, *lines)).train] == [0, 1]


def test_csv_paths_from_other_systems(tmp_path):
    touch(tmp_path, "a b/c.png", "back\\slash.png", "line\nfeed.png", "cafe\u0301.png")
    name = b"gr\xfcn.png"
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    rows = [b"a b\\c.png", b"back\\slash.png", b'"line\nfeed.png"', "caf\u00e9.png".encode("cp1252"), name]
    (tmp_path / "m.csv").write_bytes(b"path,split\n" + b"".join(row + b",train\n" for row in rows))
    found = [record.path.removeprefix(f"{tmp_path}/") for record in read(str(tmp_path / "m.csv")).train]
    names = ["a b/c.png", "back\\slash.png", "line\nfeed.png", "cafe\u0301.png", os.fsdecode(name)]
    assert found == names
    assert all(os.path.isfile(tmp_path / name) for name in names)


def test_csv_lists_no_file_twice(tmp_path):
    touch(tmp_path, "a.png")
    (tmp_path / "link.png").symlink_to("a.png")
    for again in ("./a.png", "link.png", f"{tmp_path}/a.png"):
        path = write(tmp_path / "m.csv", "path,split", "a.png,train", f"{again},train")
        with pytest.raises(ValueError, match=r"m\.csv: line 3 lists .* for train again, after line 2"):
            read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\0\0", r"this is a workbook, no CSV\. Save the sheet as CSV"),
        (b"path,split,identity\na.png,train,-2\n", r"line 2 has the identity -2; accepted are -1 \(junk\), 0, 1"),
        (b"path,split,camera\na.png,train,-3.0\n", r"line 2 has the camera -3; accepted are -1 \(unknown\)"),
        (b"path,split\n", r"there is a header but no line below it"),
        (b"", r"the file is empty; a header line and a line for each image"),
        (b" \n\n", r"the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"this is no CSV, but a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", r"this is no CSV, but an HTML page"),
        (b"\x1f\x8b\x08\0\0", r"this is no CSV, but an archive \(gzip\)"),
        ("path,split\na.png,train\n".encode("utf-16-le"), r"line 1 holds a zero byte"),
        (b"path,split,identity\na.png,train,1\0\n", r"line 2 holds a zero byte"),
        (
            b"path,split,identity\na.png,train,1.23457E+11\n",
            r"line 2 has the identity 1\.23457E\+11, a number that was",
        ),
        (b"path;split;camera\na.png;train;1,2e3\n", r"line 2 has the camera 1,2e3, a number that was shortened"),
    ],
)
def test_csv_files_that_are_none(tmp_path, content, message):
    touch(tmp_path, "a.png")
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(UserError, match=rf"m\.csv: {message}"):
        read(str(tmp_path / "m.csv"))


def test_csv_words_that_look_alike_are_one(tmp_path):
    words = ["caf\u00e9", "cafe\u0301", "caf\u00e9\u200b", "\u2060 caf\u00e9 ", "Caf\u00e9"]
    lines = [f"{i}.png,{word},0,train" for i, word in enumerate(words)]
    assert [record.identity for record in read(manifest(tmp_path, *lines)).train] == [1, 1, 1, 1, 0]


def test_csv_says_which_column_may_be_meant(tmp_path, caplog):
    path = manifest(tmp_path, "a.png,1,2,train", header="path,pid,CamID,split")
    assert short(read(path).train, tmp_path) == [("a.png", -1, -1)]
    assert "there is no column identity, so it is not known; the column pid is passed over" in caplog.text
    assert "there is no column camera, so it is not known; the column camid is passed over" in caplog.text
    caplog.clear()
    read(manifest(tmp_path, "a.png,1,2,9,train", header="path,identity,camera,label,split"))
    assert "passed over" not in caplog.text


def test_csv_with_an_endless_cell(tmp_path):
    (tmp_path / "m.csv").write_text("path,split\n" + "x" * 2000 + ",train\n")
    usual = csv.field_size_limit(1000)
    try:
        with pytest.raises(UserError, match=r"m\.csv: line 2 is no CSV \(field larger than field limit"):
            read(str(tmp_path / "m.csv"))
    finally:
        csv.field_size_limit(usual)


def test_csv_root_and_absolute_paths(tmp_path):
    touch(tmp_path / "images", "a.png")
    touch(tmp_path / "else", "b.png")
    path = manifest(tmp_path / "lists", "a.png,1,1,train", f"{tmp_path}/else/b.png,1,1,train", images=False)
    data = read(path, ROOT=str(tmp_path / "images"))
    assert short(data.train, tmp_path) == [("images/a.png", 1, 1), ("else/b.png", 1, 1)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.png,1,1,train", "b.png,1,1,probe"], r"line 3 has the split 'probe'; accepted are train, query, gallery"),
        (
            ["a.png,1,1,train", "b.png,1,1,train", "a.png,2,1,train"],
            r"line 4 lists .*a\.png for train again, after line 2",
        ),
        (
            ["a.png,1,1,train", "b.png,1,train"],
            r"line 3 has another number of cells than the header \(4: path, identity",
        ),
        (["a.png,1,1,train,9"], r"line 2 has another number of cells"),
        (
            ["a.png,1,1,train", '"b.png,1,1,train', "c.png,1,1,train"],
            r"a quotation mark of line 3 is not closed there and takes up the lines until 4\. Remove it",
        ),
        (
            ['"a.png,1,1,train', "b.png,1,1,train", 'c.png",1,1', "d.png,1,1,train"],
            r"a quotation mark of line 2 is not closed there and takes up the lines until 4\.",
        ),
        (["a.png,,1,query", "b.png,1,1,gallery"], r"line 2 has no identity; each query image needs one"),
        (["a.png,1,1,query"], r"there is no gallery image; a score needs query and gallery"),
        ([], r"there is a header but no line below it"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=rf"manifest\.csv: {message}"):
        read(manifest(tmp_path, *lines))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            "file,identity,camera,split",
            r"line 1 lacks the column path; found are file, identity, camera, split\. path and split are needed",
        ),
        ("path,identity,camera", r"line 1 lacks the column split; found are path, identity, camera\."),
        ("file,id", r"line 1 lacks the column path and split; found are file, id\."),
        ("path,camera,path,split", r"line 1 has the column path twice"),
        ("path,identity,camara,split", r"line 1 has a column 'camara'; did you mean camera\? Columns are path"),
    ],
)
def test_csv_header_errors(tmp_path, header, message):
    with pytest.raises(ValueError, match=message):
        read(manifest(tmp_path, "a.png,1,1,train", header=header))


def test_csv_same_path_in_two_splits_is_allowed(tmp_path):
    data = read(manifest(tmp_path, "a.png,1,1,query", "a.png,1,1,gallery"))
    assert data.query == data.gallery


def test_csv_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no manifest .*none\.csv; PATH names a CSV file"):
        read(str(tmp_path / "none.csv"))
    path = manifest(tmp_path, "a.png,1,1,train", "b.png,1,1,train")
    (tmp_path / "b.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"line 3: there is no image .*b\.png; paths start at"):
        read(path)


def test_csv_protocol_errors(tmp_path):
    path = manifest(tmp_path, "q.png,1,,query", "g.png,1,1,gallery")
    with pytest.raises(
        ValueError, match="PROTOCOL is 'market'; accepted are auto, cross_camera, plain, one_per_identity"
    ):
        read(path, PROTOCOL="market")
    with pytest.raises(
        ValueError, match=r"line 2 has no camera, which PROTOCOL cross_camera needs. Set PROTOCOL plain"
    ):
        read(path, PROTOCOL="cross_camera")


# counts


def test_counts_other_than_the_known_ones_are_a_warning(tmp_path, caplog):
    market(tmp_path)
    load("market1501", tmp_path)
    load("market1501", tmp_path)
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"market1501 ({tmp_path}): train has 2 images of 2 identities, known are 12,936 of 751; ")
    assert "gallery has 2 images of 2 identities, known are 15,913 of 751" in warning
    assert "5 cameras occur, known are 6" in warning


def test_known_counts_give_no_warning(tmp_path, caplog):
    @check_counts(PublishedCounts(train=(2, 1), cameras=1))
    def two(*, root: str) -> ReIDData:
        return ReIDData([Record("a", 4, 0), Record("b", 4, -1)], [], [], "plain")

    with caplog.at_level(logging.INFO):
        assert two(root=str(tmp_path)).train[0] == Record("a", 4, 0)
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert "train 2 images of 1 identities" in caplog.text


def test_known_counts_follow_the_variant():
    get = DATASET_REGISTRY.get
    assert known_counts(get("cuhk03"), variant="labeled").train == (7_368, 767)
    assert known_counts(get("cuhk03")).train == (7_365, 767)
    assert known_counts(get("vehicleid"), size=2400).gallery == (2_400, 2_400)
    assert known_counts(get("folder"), root="x") is None
    assert known_counts(lambda **keywords: None) is None


@pytest.mark.parametrize(
    ("name", "keys", "total"),
    [
        ("market1501", {}, 32_668 - 3_819 + 3_368),  # boxes of the paper, less junk, plus queries
        ("msmt17", {}, 126_441),
        ("cuhk03", {"variant": "labeled"}, 14_096),
        ("cuhk03", {"variant": "detected"}, 14_097),
        ("veri776", {}, 37_778 + 1_678 + 11_579),
        ("veriwild", {"size": 10_000}, 416_314),
    ],
)
def test_known_counts_add_up_to_the_published_totals(name, keys, total):
    known = known_counts(DATASET_REGISTRY.get(name), **keys)
    assert known.train[0] + known.query[0] + known.gallery[0] == total


# configs


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_config_names_data_and_image_size_only(file):
    content = yaml.safe_load(file.read_text())
    assert set(content) == {"DATASETS", "INPUT"}
    assert content["INPUT"] == {"SIZE": [224, 224] if file.stem.startswith("ve") else [256, 128]}
    assert set(content["DATASETS"]) <= {"TRAIN", "TESTS"}
    for section in (content["DATASETS"]["TRAIN"], *content["DATASETS"].get("TESTS", {}).values()):
        assert section.pop("NAME") == file.stem
        assert {key.lower() for key in section} <= set(DATASET_REGISTRY.schema(file.stem))


def test_each_published_set_has_a_config():
    published = {name for name, load in DATASET_REGISTRY if getattr(load, "known", (None,))[0] is not None}
    assert published == {file.stem for file in CONFIGS.glob("*.yaml")}


# real manifests


@pytest.mark.parametrize(("name", "protocol"), [("omniglot", "cross_camera"), ("grocery", "plain")])
def test_real_manifest(tmp_path, name, protocol):
    archive = SHARED / f"{name}.tar"
    if not archive.is_file():
        pytest.skip(f"{archive} is not here")
    import tarfile

    with tarfile.open(archive) as tar:
        text = next(member for member in tar if member.name.endswith("manifest.csv"))
        lines = tar.extractfile(text).read().decode().splitlines()
    rows = list(csv.DictReader(lines))
    write(tmp_path / "manifest.csv", *lines)
    touch(tmp_path, *(row["path"] for row in rows))
    data = read(str(tmp_path / "manifest.csv"))
    assert data.protocol == protocol
    for split, records in zip(("train", "query", "gallery"), data[:3], strict=True):
        expected = [(row["path"], int(row["identity"]), int(row["camera"])) for row in rows if row["split"] == split]
        assert short(records, tmp_path) == expected
    assert count(data).train[0] > 2_000
