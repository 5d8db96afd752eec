"""Small pictures are upright, keep their aspect, are made once and made again for a changed photo."""

from __future__ import annotations

import io
import os

import pytest
from PIL import Image

from fastreid_uns.photos.thumbnails import EDGE, Thumbnails, photo_id, picture


@pytest.fixture
def photo(tmp_path):
    image = Image.new("RGB", (1600, 800), "red")
    image.paste("blue", (0, 0, 400, 800))
    exif = Image.Exif()
    exif[274] = 6  # to be shown a quarter clockwise: what is left goes up
    image.save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


def test_aspect_and_orientation(photo):
    small = Image.open(io.BytesIO(picture(photo, 200)))
    assert small.size == (100, 200)
    assert small.getpixel((50, 20))[2] > 200  # blue above
    assert small.getpixel((50, 120))[0] > 200


def test_made_once_and_again_when_the_photo_changes(photo, tmp_path):
    small = Thumbnails(tmp_path / "small")
    file = small.file("photo.jpg", photo)
    before = file.stat().st_ino
    assert max(Image.open(file).size) == EDGE
    assert small.file("photo.jpg", photo).stat().st_ino == before
    Image.new("RGB", (50, 40), "green").save(photo)
    os.utime(photo, (1, 1))  # older than the small picture, yet another file
    assert Image.open(small.file("photo.jpg", photo)).size == (50, 40)
    photo.unlink()
    assert Image.open(small.file("photo.jpg", photo)).size == (50, 40)


def test_a_planted_link_is_not_served(photo, tmp_path):
    small = Thumbnails(tmp_path / "small")
    file = small.file("photo.jpg", photo)
    secret = tmp_path / "secret"
    secret.write_text("secret")
    os.utime(secret, ns=(photo.stat().st_mtime_ns,) * 2)
    file.unlink()
    file.symlink_to(secret)
    assert Image.open(small.file("photo.jpg", photo)).size == (EDGE // 2, EDGE)
    assert secret.read_text() == "secret"


def test_what_cannot_be_read_gets_a_picture_of_its_own(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("broken.jpg", "pipe.jpg", "missing.jpg"):
        assert Image.open(Thumbnails(tmp_path / "small").file(name, tmp_path / name)).size == (EDGE // 2, EDGE // 2)


def test_ids_hold_no_path():
    names = ["../../etc/passwd", "a.jpg", os.fsdecode(b"\xff.jpg")]
    assert len({photo_id(name) for name in names}) == 3
    assert all(photo_id(name).isalnum() for name in names)
