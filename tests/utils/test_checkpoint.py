import errno
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.utils import checkpoint

ROOT = Path(__file__).parents[2]


def content(value: float = 1.0) -> dict:
    return {"model": {"weight": torch.full((2, 2), value)}, "config": "SEED: 1\n"}


def test_saved_files_load_without_trust(tmp_path):
    checkpoint.save_checkpoint(content(3.0), tmp_path / "a.pth")
    assert checkpoint.load_checkpoint(tmp_path / "a.pth")["model"]["weight"].tolist() == [[3, 3], [3, 3]]


def test_a_full_disk_keeps_the_old_file_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    file = tmp_path / "a.pth"
    checkpoint.save_checkpoint(content(1.0), file)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match=r"could not be written.*No space left.*--resume"):
        checkpoint.save_checkpoint(content(2.0), file)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert checkpoint.load_checkpoint(file)["model"]["weight"][0, 0] == 1


def test_a_process_killed_while_saving_leaves_the_old_file(tmp_path):
    file = tmp_path / "a.pth"
    checkpoint.save_checkpoint(content(1.0), file)
    code = f"""
        import os, signal, torch
        from pathlib import Path
        from fastreid_uns.utils import checkpoint
        def die(content, stream):
            stream.write(b"half a file"); stream.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.save = die
        checkpoint.save_checkpoint({{"model": {{}}, "config": ""}}, Path({str(file)!r}))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert checkpoint.load_checkpoint(file)["model"]["weight"][0, 0] == 1
    checkpoint.save_checkpoint(content(2.0), file)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_every_flipped_bit_is_refused(tmp_path):
    """One bit in each of 150 bytes spread over the file, headers and checksum included, and in each of the last 90."""
    checkpoint.save_checkpoint(content(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    places = {*range(0, len(whole), len(whole) // 150), *range(len(whole) - 90, len(whole))}
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "b.pth").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"b\.pth is "):
            checkpoint.load_checkpoint(tmp_path / "b.pth")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off(tmp_path, share):
    checkpoint.save_checkpoint(content(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: max(4, int(share * len(whole)))])
    with pytest.raises(ValueError, match=r"a\.pth is damaged or cut off.*Delete it to go on from an earlier one"):
        checkpoint.load_checkpoint(tmp_path / "a.pth")


def test_a_file_without_our_checksum_is_read_by_those_of_its_archive(tmp_path):
    torch.save(content(3.0), tmp_path / "a.pth")
    assert checkpoint.load_checkpoint(tmp_path / "a.pth")["model"]["weight"][0, 0] == 3
    whole = bytearray((tmp_path / "a.pth").read_bytes())
    place = whole.index(torch.full((4,), 3.0).numpy().tobytes())
    whole[place + 2] ^= 1
    (tmp_path / "a.pth").write_bytes(whole)
    with pytest.raises(ValueError, match=r"damaged or cut off \(the checksum of a/data/0 is another one\)"):
        checkpoint.load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "an HTML page"),
        (b"epoch 3 loss 0.5\n", "text that begins with 'epoch 3"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "a PNG picture"),
    ],
)
def test_a_file_of_another_kind_is_named(tmp_path, data, kind):
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(ValueError, match=rf"checkpoint: \S*a\.pth is {kind}"):
        checkpoint.load_checkpoint(tmp_path / "a.pth")


def test_a_planted_link_is_replaced_and_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("keep me")
    (tmp_path / "a.pth").symlink_to(victim)
    (tmp_path / "a.pth.part").symlink_to(victim)
    (tmp_path / "last").symlink_to(victim)
    checkpoint.save_checkpoint(content(), tmp_path / "a.pth")
    checkpoint.point_to_last(tmp_path / "a.pth")
    assert victim.read_text() == "keep me"
    assert not (tmp_path / "a.pth").is_symlink()
    assert not (tmp_path / "last").is_symlink()


def test_the_mask_of_the_user_decides_who_may_read(tmp_path):
    old = os.umask(0o027)
    try:
        checkpoint.save_checkpoint(content(), tmp_path / "a.pth")
    finally:
        os.umask(old)
    assert (tmp_path / "a.pth").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("pointer", [None, "", "checkpoint_0099.pth", "../elsewhere.pth", "\0\xff"])
def test_without_a_good_pointer_the_newest_checkpoint_is_found(tmp_path, pointer, caplog):
    for name in ("checkpoint_0003.pth", "checkpoint_0012.pth", "checkpoint_10000.pth", "checkpoint_x.pth", "best.pth"):
        (tmp_path / name).touch()
    (tmp_path / "checkpoint_20000.pth").mkdir()
    (tmp_path.parent / "elsewhere.pth").touch()
    if pointer is not None:
        (tmp_path / "last").write_text(pointer)
    logging.getLogger("fastreid_uns").propagate = True
    assert checkpoint.last_checkpoint(tmp_path).name == "checkpoint_10000.pth"
    assert "names no checkpoint; checkpoint_10000.pth is the newest one" in caplog.text
    checkpoint.point_to_last(tmp_path / "checkpoint_0003.pth")
    assert checkpoint.last_checkpoint(tmp_path).name == "checkpoint_0003.pth"


def test_the_copy_of_a_checkpoint_is_equal_and_written_whole(tmp_path, monkeypatch):
    one, two = tmp_path / "a.pth", tmp_path / "best.pth"
    checkpoint.save_checkpoint(content(1.0), one)
    checkpoint.copy_checkpoint(one, two)
    assert one.read_bytes() == two.read_bytes()
    checkpoint.save_checkpoint(content(2.0), one)

    def full(source, target):
        target.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(RuntimeError, match=r"best\.pth could not be written.*No space left"):
        checkpoint.copy_checkpoint(one, two)
    assert checkpoint.load_checkpoint(two)["model"]["weight"][0, 0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "best.pth"]


class Malicious:
    def __reduce__(self):
        return os.system, ("echo never",)


def test_code_in_a_checkpoint_is_refused(tmp_path):
    torch.save({"model": Malicious(), "config": ""}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=r"bad\.pth holds more than tensors and plain values.*refused"):
        checkpoint.load_checkpoint(tmp_path / "bad.pth")


def test_a_damaged_file(tmp_path):
    checkpoint.save_checkpoint(content(), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"a\.pth is damaged or cut off"):
        checkpoint.load_checkpoint(tmp_path / "a.pth")


def test_a_foreign_file(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"not a checkpoint of this framework.*MODEL\.WEIGHTS"):
        checkpoint.load_checkpoint(tmp_path / "a.pth")


def test_no_file_and_no_checkpoint_in_a_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pth does not exist"):
        checkpoint.load_checkpoint(tmp_path / "gone.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint was found"):
        checkpoint.last_checkpoint(tmp_path)


def test_weights_of_another_model(tmp_path):
    with pytest.raises(ValueError, match=r"x\.pth was made with another model:.*size mismatch"):
        checkpoint.load_model(nn.Linear(3, 2, bias=False), content(), "x.pth")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("config", 5, "int"), ("model", [1], "list"), ("num_images", "x", "str"), ("epochs_done", True, "bool")],
)
def test_a_part_of_another_kind_is_named(tmp_path, name, value, kind):
    content = {"model": {}, "config": "", "num_images": 3, "epochs_done": 1, name: value}
    checkpoint.save_checkpoint(content, tmp_path / "a.pth")
    with pytest.raises(InvalidValue, match=rf"a\.pth is not a checkpoint of this framework \({name} is {kind}\)"):
        checkpoint.load_checkpoint(tmp_path / "a.pth")


def test_weights_that_are_no_tensors_are_those_of_another_model():
    with pytest.raises(InvalidValue, match=r"a\.pth was made with another model"):
        checkpoint.load_model(nn.Linear(2, 2), {"model": {"weight": 5, "bias": "x"}}, "a.pth")
