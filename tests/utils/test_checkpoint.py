import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

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
