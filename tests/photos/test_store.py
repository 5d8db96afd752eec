"""The output folder keeps names, versions and other people's files, and nothing leads out of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile
from fastreid_uns.photos.files import replacement, write_file
from fastreid_uns.photos.group_folders import layout
from fastreid_uns.photos.members import Member
from fastreid_uns.photos.store import PhotoRun

STRANGE = (
    "plain.jpg",
    "with space.jpg",
    "Ärger/grüße.jpg",
    "comma, and 'quotes\".jpg",
    "line\nbreak.jpg",
    "carriage\rreturn.jpg",
    "<img src=x onerror=alert(1)>.jpg",
    os.fsdecode(b"no-utf8-\xff.jpg"),
)


@pytest.fixture
def run(tmp_path) -> PhotoRun:
    photos = tmp_path / "photos"
    for name in STRANGE:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(name.encode("utf-8", "surrogateescape"))
    return PhotoRun.create(tmp_path / "out", photos)


def strange_members() -> list[Member]:
    return [Member(name, 1 + i // 3, 0.25, 2, 0.5) for i, name in enumerate(STRANGE)]


def test_all_names_survive_the_way_through_the_file(run):
    members = [*strange_members()[:-1], Member(STRANGE[-1], 9, 1.0)]
    assert run.write_groups(members) == 1
    assert run.groups() == members
    assert PhotoRun(run.folder).groups() == members


def test_the_file_is_what_a_spreadsheet_expects(run):
    run.write_groups([Member("plain.jpg", 1, 0.987, 3, 0.12345), Member("a, b.jpg", 2, 1.0)])
    lines = run.groups_file.read_text(encoding="utf-8").splitlines()
    assert lines == ["path,group,confidence,nearest,similarity", "plain.jpg,1,0.99,3,0.123", '"a, b.jpg",2,1.00,,']


def test_history_keeps_every_version_and_restores_it(run):
    first, second = [Member("plain.jpg", 1, 0.5)], [Member("plain.jpg", 7, 0.5)]
    assert run.version == 0
    assert [run.write_groups(first), run.write_groups(second, seconds={"group": 3})] == [1, 2]
    assert run.groups(1) == first
    assert run.groups() == second
    assert run.about["seconds"] == {"group": 3}
    assert run.restore(1) == 3
    assert run.groups() == first
    assert run.last_number == 7  # not given again
    with pytest.raises(MissingFile, match="no such version"):
        run.groups(9)


@pytest.mark.parametrize("path", ["/etc/passwd", "../out.jpg", "a/../../b.jpg", "", "a//b.jpg", "a\0b", "./a"])
def test_no_path_leads_out_of_the_folder(run, path):
    with pytest.raises(InvalidValue, match="leads out"):
        run.photo(path)
    with pytest.raises(InvalidValue, match="leads out"):
        run.write_groups([Member(path, 1, 1.0)])
    assert run.version == 0


def test_a_photo_occurs_once(run):
    with pytest.raises(InvalidValue, match="occurs 2 times"):
        run.write_groups([Member("plain.jpg", 1, 1.0), Member("plain.jpg", 2, 1.0)])


@pytest.mark.parametrize("member", [Member("a", 0, 1.0), Member("a", 1, float("nan")), Member("a", 1, 1.5)])
def test_what_no_reader_would_accept_is_not_written(run, member):
    with pytest.raises(InvalidValue, match="from 0 to 1"):
        run.write_groups([member])
    assert run.version == 0


def test_links_and_copies_follow_the_groups_and_leave_other_files_alone(run):
    root = run.folder / "groups"
    run.write_groups(strange_members())
    run.link_groups()
    assert (root / "0001" / "with space.jpg").resolve() == run.photos / "with space.jpg"
    assert (root / "0002" / "line\nbreak.jpg").is_symlink()
    (root / "0001" / "note.txt").write_text("mine")
    run.write_groups([member._replace(group=4) for member in strange_members()])
    run.link_groups(copy=True)
    assert sorted(file.name for file in root.iterdir()) == ["0001", "0004"]
    assert [file.name for file in (root / "0001").iterdir()] == ["note.txt"]
    copied = root / "0004" / "grüße.jpg"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (run.photos / "Ärger/grüße.jpg").read_bytes()
    run.write_groups([member._replace(group=5) for member in strange_members()])
    run.link_groups()
    assert sorted(file.name for file in root.iterdir()) == ["0001", "0005"]
    assert all((run.photos / name).is_file() for name in STRANGE)


def test_photos_of_one_name_get_different_places():
    members = [Member("a/x.jpg", 1, 1.0), Member("b/x.jpg", 1, 1.0), Member("c/X.JPG", 1, 1.0), Member("x.jpg", 2, 1.0)]
    assert list(layout(members).values()) == ["0001/x.jpg", "0001/x-2.jpg", "0001/X-3.JPG", "0002/x.jpg"]


def test_links_that_somebody_planted_are_not_followed(run, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "0001").mkdir()
    run.write_groups(strange_members())
    (run.folder / "groups").symlink_to(elsewhere)
    with pytest.raises(InvalidState, match="symbolic link"):
        run.link_groups()
    assert list((elsewhere / "0001").iterdir()) == []
    (run.folder / "groups").unlink()
    (run.folder / "groups").mkdir()
    (run.folder / "groups" / "0001").symlink_to(elsewhere)
    run.link_groups()  # the link is ours to replace, its target is not touched
    assert (run.folder / "groups" / "0001").is_dir()
    assert not (run.folder / "groups" / "0001").is_symlink()
    assert list((elsewhere / "0001").iterdir()) == []


def test_a_second_season_keeps_its_own_names(run, tmp_path):
    season = tmp_path / "season 2"
    season.mkdir()
    (season / "plain.jpg").write_bytes(b"x")
    assert run.add_folder(season) == "season 2/"
    assert run.add_folder(season) == "season 2/"
    assert run.photo("season 2/plain.jpg") == season / "plain.jpg"
    other = tmp_path / "deep" / "season 2"
    other.mkdir(parents=True)
    assert run.add_folder(other) == "season 2-2/"
    assert run.add_folder(run.photos) == ""
    assert run.add_folder(run.photos / "Ärger") == "Ärger/"  # part of a folder that is known
    (season / "summer").mkdir()
    assert run.add_folder(season / "summer") == "season 2/summer/"


def test_one_output_folder_holds_one_set_of_photos(run, tmp_path):
    assert PhotoRun.create(run.folder, run.photos).photos == run.photos
    with pytest.raises(InvalidState, match="holds groups of"):
        PhotoRun.create(run.folder, tmp_path / "others")
    with pytest.raises(MissingFile, match=r"run\.json"):
        PhotoRun(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InvalidState, match="cannot be made"):
        PhotoRun.create(tmp_path / "file", run.photos)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("a.jpg,x,1,,", "row 2.*invalid literal"),
        ("a.jpg,0,1,,", "numbers from 1"),
        ("a.jpg,1,nan,,", "0 to 1"),
        ("a.jpg,1", "2 fields"),
    ],
)
def test_a_damaged_row_is_named(run, line, reason):
    run.groups_file.write_text(f"path,group,confidence,nearest,similarity\nb.jpg,1,1,,\n{line}\n")
    with pytest.raises(InvalidValue, match=reason):
        run.groups()


def test_a_damaged_run_file_is_named(run):
    (run.folder / "run.json").write_text("{")
    with pytest.raises(InvalidValue, match=r"run\.json"):
        _ = run.about


def test_state_is_read_only_under_its_fingerprint(run):
    run.save_state("features", "abc", {"feats": np.eye(3, dtype=np.float32)})
    assert np.array_equal(run.state("features", "abc")["feats"], np.eye(3))
    assert run.state("features", "abd") is None
    assert run.state("other", "abc") is None
    file = run.folder / "state" / "features.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    assert run.state("features", "abc") is None


def test_two_processes_do_not_share_a_folder(run):
    with run.locked(), pytest.raises(InvalidState, match="another process"), PhotoRun(run.folder).locked():
        pass
    with run.locked():
        pass


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    file = tmp_path / "a.txt"
    write_file(file, b"old")

    def fill_the_disk():
        with replacement(file) as stream:
            stream.write(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(InvalidState, match=r"No space left.*untouched"):
        fill_the_disk()
    with pytest.raises(KeyboardInterrupt), replacement(file):
        raise KeyboardInterrupt
    assert file.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_a_planted_link_is_replaced_not_followed(tmp_path):
    victim, file = tmp_path / "victim", tmp_path / "a.txt"
    victim.write_text("precious")
    file.symlink_to(victim)
    write_file(file, b"new")
    assert victim.read_text() == "precious"
    assert not file.is_symlink()


def test_run_json_is_plain(run):
    run.update(weights={"name": "x", "sha256": "y"})
    about = json.loads((run.folder / "run.json").read_text())
    assert about["weights"] == {"name": "x", "sha256": "y"}
    assert Path(about["photos"]) == run.photos
