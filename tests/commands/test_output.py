"""Files that commands give: links in their place are replaced, what the disk does not allow is one message."""

from pathlib import Path

import pytest

from fastreid_uns.commands.output import make_folder, write_output
from fastreid_uns.commands.pictures import Cell, Row, write_page, write_png
from fastreid_uns.errors import InvalidState


def test_a_link_is_replaced_and_not_followed(tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    for write in (
        lambda file: write_output(file, b"new"),
        lambda file: write_png([Row("title", [Cell("a.jpg", "black", "")])], file, (16, 8)),
        lambda file: write_page("title", [], file),
    ):
        file = tmp_path / "file"
        file.unlink(missing_ok=True)
        file.symlink_to(other)
        write(file)
        assert not file.is_symlink()
        assert other.read_text() == "mine"


def test_a_folder_is_made_where_there_is_none(tmp_path):
    write_output(tmp_path / "a/b/c", b"content")
    assert (tmp_path / "a/b/c").read_bytes() == b"content"


def test_what_the_disk_does_not_allow_is_told(tmp_path):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(
        InvalidState, match=r"file/below: the folder cannot be made \(Not a directory\)\. Choose another"
    ):
        make_folder(tmp_path / "file/below")
    with pytest.raises(InvalidState, match=r"/proc/\S+: the folder cannot be made"):
        write_output(Path("/proc/nothing/file"), b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InvalidState, match=r"folder: the file could not be written \(Is a directory\)"):
        write_output(tmp_path / "folder", b"")


def test_a_page_names_files_whose_names_are_no_text(tmp_path):
    write_page("title \udcff", [("<script>", "a & b", "")], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<h1>title ?</h1>" in page
    assert "<h2>&lt;script&gt;</h2><p>a &amp; b</p>" in page
