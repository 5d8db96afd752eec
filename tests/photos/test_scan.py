"""What a scan finds in folders that are written here file by file."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastreid_uns.errors import InvalidValue, MissingFile
from fastreid_uns.photos import scan as scan_module
from fastreid_uns.photos.scan import input_size, scan


def photo(path: Path, width: int = 40, height: int = 20, seed: int = 0, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **options)
    return os.path.realpath(path)


def test_photos_at_any_depth_in_order_of_name(tmp_path):
    names = ["B.JPG", "a b/ü.png", "a/deep/x.webp", "a/y.jfif", "z.TIFF"]
    paths = [photo(tmp_path / name, seed=i, format="PNG") for i, name in enumerate(names)]
    found = scan(tmp_path)
    assert found.names == names
    assert found.photos == paths
    assert found.total_bytes == sum(os.path.getsize(path) for path in paths)
    assert (found.unreadable, found.duplicates, dict(found.passed_over), found.hidden) == ([], [], {}, 0)
    assert found.folder == os.path.realpath(tmp_path)


def test_what_is_passed_over_is_counted_by_extension(tmp_path):
    photo(tmp_path / "a.jpg")
    for name in ("1.HEIC", "2.heic", "3.avif", "4.txt", "noend", ".hidden.jpg", ".git/x.jpg", "__MACOSX/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"?")
    os.mkfifo(tmp_path / "pipe.jpg")
    os.symlink("nowhere", tmp_path / "broken.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
        found = scan(tmp_path)
    assert found.names == ["a.jpg"]
    assert found.passed_over == {
        ".heic": 2,
        ".avif": 1,
        ".txt": 1,
        "no extension": 1,
        "pipe, socket or device": 2,
        "broken link": 1,
    }
    assert found.hidden == 3
    assert any("2 .heic" in line and "convert pictures to JPEG" in line for line in found.summary())


def test_unreadable_files_have_a_reason(tmp_path):
    photo(tmp_path / "b.jpg")
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "c.jpg").write_bytes(b"<html>404</html>")
    found = scan(tmp_path)
    assert found.names == ["b.jpg"]
    assert found.unreadable == [
        (os.path.realpath(tmp_path / "a.jpg"), "the file is empty"),
        (os.path.realpath(tmp_path / "c.jpg"), "the file is a web page (HTML), no picture"),
    ]
    assert "2 files cannot be read" in "\n".join(found.summary())


def test_equal_files_are_grouped(tmp_path):
    first = photo(tmp_path / "a.bmp", seed=1)
    other = photo(tmp_path / "b.bmp", seed=2)  # as many bytes
    (tmp_path / "sub").mkdir()
    copy = os.path.realpath(shutil.copy(first, tmp_path / "sub/c.bmp"))
    os.link(other, tmp_path / "hard.bmp")
    found = scan(tmp_path)
    assert len(found.photos) == 4
    assert found.duplicates == [[first, copy], [other, os.path.realpath(tmp_path / "hard.bmp")]]
    assert "2 photos more than once" in "\n".join(found.summary())


def test_files_of_different_size_are_not_read_again(tmp_path, monkeypatch):
    photo(tmp_path / "a.bmp", width=10)
    photo(tmp_path / "b.bmp", width=20)
    monkeypatch.setattr(scan_module, "_digest", lambda path: pytest.fail(f"{path} is read"))
    assert scan(tmp_path).duplicates == []


def test_links_lead_to_each_file_once(tmp_path):
    root, outside = tmp_path / "photos", tmp_path / "outside"
    inside = photo(root / "d/a/x.jpg", seed=1)
    far = photo(outside / "y.jpg", seed=2)
    single = photo(tmp_path / "single.jpg", seed=3)
    os.symlink("..", root / "d/a/up")
    os.symlink(root, root / "0loop")
    os.symlink("itself", root / "itself")
    os.symlink(outside, root / "to outside")
    os.symlink(outside, root / "to outside again")
    os.symlink(single, root / "one.jpg")
    os.symlink(inside, root / "0alias.jpg")
    found = scan(root)
    assert dict(zip(found.names, found.photos, strict=True)) == {
        "d/a/x.jpg": inside,
        "one.jpg": single,
        "to outside/y.jpg": far,
    }
    assert found.passed_over == {"broken link": 1}
    os.symlink(root, tmp_path / "alias")
    assert scan(tmp_path / "alias") == found


def test_shape_is_that_of_the_photos_as_displayed(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    for i in range(3):
        photo(tmp_path / f"{i}.jpg", width=200, height=100, seed=i, exif=exif)
    photo(tmp_path / "square.tif", width=50, height=50)
    found = scan(tmp_path)
    assert found.aspect == 0.5
    assert found.size == (320, 160)


@pytest.mark.parametrize(
    ("aspect", "pixels", "expected"),
    [
        (1.0, 224 * 224, (224, 224)),
        (0.5, 256 * 128, (256, 128)),
        (4 / 3, 224 * 224, (192, 256)),  # 194 x 259
        (0.75, 128 * 128, (160, 96)),  # 148 x 111, rounded to multiples of 32
        (1000.0, 224 * 224, (32, 7072)),
        (1.0, 100, (32, 32)),
    ],
)
def test_input_size(aspect, pixels, expected):
    assert input_size(aspect, pixels) == expected


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_photos(tmp_path, count):
    for i in range(count):
        photo(tmp_path / f"{i}.jpg", seed=i)
    found = scan(tmp_path)
    assert len(found.photos) == count
    assert found.summary()[0].startswith(f"{count} photo{'' if count == 1 else 's'} in ")
    assert found.size == ((160, 320) if count else (224, 224))


def test_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"\xff\xfe\n.jpg")
    photo(tmp_path / "a.png").encode()
    os.rename(tmp_path / "a.png", os.path.join(tmp_path, name))
    Path(os.path.join(tmp_path, "\x1b[31m.jpg")).write_bytes(b"")
    found = scan(tmp_path)
    assert found.names == [name]
    text = "\n".join(found.summary())
    text.encode()
    assert "\x1b" not in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_folders_without_permission_are_counted(tmp_path):
    photo(tmp_path / "shut/a.jpg")
    (tmp_path / "shut").chmod(0)
    try:
        assert scan(tmp_path).passed_over == {"folder that cannot be read": 1}
    finally:
        (tmp_path / "shut").chmod(0o700)


def test_places_that_are_no_folder(tmp_path):
    with pytest.raises(MissingFile, match="there is no such folder"):
        scan(tmp_path / "nowhere")
    with pytest.raises(InvalidValue, match="this is no folder"):
        scan(photo(tmp_path / "a.jpg"))
