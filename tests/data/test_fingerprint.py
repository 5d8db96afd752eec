"""What tells the images of a run from others."""

import os
import shutil

import pytest

from fastreid_uns.data.fingerprint import fingerprint
from fastreid_uns.structures import Record


@pytest.fixture
def folder(tmp_path):
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        file = tmp_path / "set" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode() * 3000)
    return tmp_path / "set"


def records(folder) -> list[Record]:
    return [Record(str(file), -1, 0) for file in sorted(folder.rglob("*.jpg"))]


def test_a_copy_elsewhere_with_other_times_is_the_same(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "deep" / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "deep" / "copy" / "a" / "1.jpg", (1, 1))
    assert fingerprint(records(tmp_path / "deep" / "copy")) == fingerprint(records(folder))


def replaced(folder):
    (folder / "a/1.jpg").write_bytes(b"A/1.jpg" * 2999 + b"A/9.jpg")  # as long as before


def added(folder):
    shutil.copyfile(folder / "a/1.jpg", folder / "a/4.jpg")


def removed(folder):
    (folder / "b/3.jpg").unlink()


def renamed(folder):
    (folder / "b/3.jpg").rename(folder / "b/5.jpg")


def exchanged(folder):
    (folder / "a/1.jpg").rename(folder / "a/0")
    (folder / "a/2.jpg").rename(folder / "a/1.jpg")
    (folder / "a/0").rename(folder / "a/2.jpg")


@pytest.mark.parametrize("change", [replaced, added, removed, renamed, exchanged])
def test_every_change_shows(folder, change):
    before = fingerprint(records(folder))
    change(folder)
    assert fingerprint(records(folder)) != before


def test_order_and_cameras_count_and_identities_do_not(folder):
    given = records(folder)
    assert fingerprint(given[::-1]) != fingerprint(given)
    assert fingerprint([given[0]._replace(camera=1), *given[1:]]) != fingerprint(given)
    assert fingerprint([record._replace(identity=7) for record in given]) == fingerprint(given)
    assert fingerprint([]) == fingerprint([])
