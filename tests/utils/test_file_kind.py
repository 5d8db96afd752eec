"""Files that are taken for weights and are none."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from fastreid_uns.errors import InvalidState
from fastreid_uns.modeling.weights import load_weights
from fastreid_uns.utils.file_kind import foreign_kind, is_safetensors

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 102530333\n"


def picture(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, kind)
    return stream.getvalue()


def torch_bytes(**options) -> bytes:
    stream = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"),
        (POINTER, "a Git LFS pointer: .* Run: git lfs pull"),
        (b"<!DOCTYPE html>\n<html>Sign in</html>", "an HTML page, .* save the file"),
        (b"\xef\xbb\xbf\n  <html>", "an HTML page"),
        (b"Entry not found", "text that begins with 'Entry not found'"),
        ("Zugriff verweigert für alle".encode(), "text that begins with 'Zugriff verweigert für"),
        (b"a" * 511 + "ü".encode(), "text that begins"),  # a letter that is cut in two
        (picture("PNG"), "a PNG picture"),
        (picture("JPEG"), "a JPEG picture"),
        (gzip.compress(b"x", mtime=0), r"an archive \(gzip\). Unpack it"),
        (bytes(range(1, 200)), "bytes of an unknown kind, beginning with 01 02 03"),
        (b"\xff" * 600, "bytes of an unknown kind, beginning with ff ff"),
    ],
)
def test_a_file_is_named_for_what_it_is(content: bytes, kind: str, tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    file.write_bytes(content)
    with pytest.raises(InvalidState, match=rf"w\.pth: no file of weights, but {kind}"):
        load_weights(torch.nn.Linear(2, 2), str(file))


@pytest.mark.parametrize(
    ("content", "safe"),
    [
        (torch_bytes(), False),
        (torch_bytes(_use_new_zipfile_serialization=False), False),
        (safetensors_bytes({"weight": torch.ones(2)}), True),
        (safetensors_bytes({}), True),
    ],
    ids=["zip", "pickle", "safetensors", "empty safetensors"],
)
def test_what_may_be_weights_passes(content: bytes, safe: bool, tmp_path: Path) -> None:
    file = tmp_path / "w"
    file.write_bytes(content)
    assert foreign_kind(file) is None
    assert is_safetensors(file) == safe


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    (tmp_path / "w.pth").write_bytes(safetensors_bytes(net.state_dict()))
    torch.save(net.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        assert load_weights(torch.nn.Linear(2, 2), str(tmp_path / name)).share == 1.0


@pytest.mark.parametrize("new", [True, False], ids=["zip", "pickle"])
def test_every_cut_of_a_file_is_one_error(new: bool, tmp_path: Path) -> None:
    content = torch_bytes(_use_new_zipfile_serialization=new)
    for end in range(1, len(content) - 1, 37):
        (tmp_path / "w.pth").write_bytes(content[:end])
        with pytest.raises(InvalidState, match=r"w\.pth: (no readable torch file|no file of weights|refused)"):
            load_weights(torch.nn.Linear(2, 2), str(tmp_path / "w.pth"))
