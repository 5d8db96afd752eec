"""Rows that are kept: what is put is taken, and a file goes on where an interruption left it."""

from __future__ import annotations

import os

import pytest
import torch

from fastreid_uns.photos.view_store import ViewStore

SHAPE = (4, 2, 3)  # four photos, two views of each, three numbers a view


def filled(store: ViewStore, first: int, last: int, dtype: torch.dtype = torch.float32) -> ViewStore:
    """Photos from the first to before the last, their values counted from 0."""
    store.begin(SHAPE, dtype)
    for photo in range(first, last):
        store.put(slice(photo, photo + 1), torch.arange(6.0).view(1, 2, 3) + 6 * photo)
    return store


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("on_disk", [False, True])
def test_rows_are_taken_by_photo_and_view(tmp_path, dtype, on_disk):
    store = filled(ViewStore(tmp_path / "state" / "kept.bin" if on_disk else None), 0, 4, dtype)
    assert (len(store), store.number, store.done) == (4, 2, 4)
    assert torch.equal(store.take(slice(1, 3)), torch.arange(6.0, 18).view(2, 2, 3))
    chosen = store.take(torch.tensor([2, 0]), torch.tensor([[1], [0]]))
    assert chosen.tolist() == [[[15, 16, 17]], [[0, 1, 2]]]
    assert chosen.dtype == torch.float32
    some = store.part(torch.tensor([3, 1]))
    assert torch.equal(some.take(slice(0, 2)), store.take(torch.tensor([3, 1])))
    assert (tmp_path / "state").exists() == on_disk
    store.remove()
    assert store.take(slice(3, 4)).flatten().tolist() == [18, 19, 20, 21, 22, 23]
    assert not list(tmp_path.glob("state/*"))


def test_a_file_goes_on_after_its_last_block(tmp_path):
    filled(ViewStore(tmp_path / "kept.bin", "one"), 0, 3)
    again = ViewStore(tmp_path / "kept.bin", "one")
    assert again.done == 3
    assert torch.equal(filled(again, 3, 4).take(slice(0, 4)), torch.arange(24.0).view(SHAPE))


def test_another_mark_begins_anew(tmp_path):
    filled(ViewStore(tmp_path / "kept.bin", "one"), 0, 3)
    assert ViewStore(tmp_path / "kept.bin", "two").done == 0
    assert filled(ViewStore(tmp_path / "kept.bin", "two"), 0, 1).done == 1
    assert ViewStore(tmp_path / "kept.bin", "one").done == 0


@pytest.mark.parametrize("content", [b"", b"short", bytes(5000), bytes(8) + b'{"mark": "one"}'.ljust(5000)])
def test_a_damaged_file_begins_anew(tmp_path, content):
    (tmp_path / "kept.bin").write_bytes(content)
    assert ViewStore(tmp_path / "kept.bin", "one").done == 0
    assert filled(ViewStore(tmp_path / "kept.bin", "one"), 0, 4).done == 4


def test_a_file_that_was_cut_off_begins_anew(tmp_path):
    filled(ViewStore(tmp_path / "kept.bin", "one"), 0, 4)
    os.truncate(tmp_path / "kept.bin", 4100)
    assert ViewStore(tmp_path / "kept.bin", "one").done == 0


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "other.txt").write_text("mine")
    (tmp_path / "kept.bin").symlink_to(tmp_path / "other.txt")
    filled(ViewStore(tmp_path / "kept.bin", "one"), 0, 4)
    assert (tmp_path / "other.txt").read_text() == "mine"
    assert not (tmp_path / "kept.bin").is_symlink()


def test_a_disk_without_space_is_named(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastreid_uns.photos.view_store.os.posix_fallocate", full)
    with pytest.raises(RuntimeError, match=r"0\.0 GB are needed there .* \(No space left on device\)"):
        filled(ViewStore(tmp_path / "kept.bin"), 0, 1)
    assert not list(tmp_path.iterdir())
