"""Which code a run belongs to."""

import shutil
import subprocess

import pytest

from fastreid_uns.utils.environment import commit


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_results_that_a_run_writes_do_not_make_its_code_another(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert commit(tmp_path) == "unknown"
    git("init")
    (tmp_path / "results.json").write_text("[]")
    (tmp_path / "loss.py").write_text("x = 1")
    git("add", ".")
    git("commit", "-m", "first")
    name = commit(tmp_path)
    assert len(name) >= 7
    (tmp_path / "results.json").write_text("[1]")
    assert commit(tmp_path) == name
    (tmp_path / "loss.py").write_text("x = 22")
    assert commit(tmp_path) == f"{name}-dirty"
