"""The tool that runs all studies in one call: what it unpacks, and what it hands on."""

import sys
import tarfile
from pathlib import Path

import pytest

from fastreid_uns.commands import compare

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import evidence


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """An empty checkout with a folder of one archive."""
    root = tmp_path / "checkout"
    (root / "datasets").mkdir(parents=True)
    (tmp_path / "zoo").mkdir()
    (tmp_path / "zoo/manifest.csv").write_text("new")
    (root / "gpu").mkdir()
    with tarfile.open(root / "gpu/zoo.tar.xz", "w:xz") as archive:
        archive.add(tmp_path / "zoo", "zoo")
    monkeypatch.setattr(evidence, "ROOT", root)
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "7")
    monkeypatch.chdir(tmp_path)
    return root


def test_archives_are_unpacked_once(checkout):
    archive = checkout / "gpu/zoo.tar.xz"
    evidence.unpack(archive)
    manifest = checkout / "datasets/zoo/manifest.csv"
    assert manifest.read_text() == "new"
    manifest.write_text("kept")
    evidence.unpack(archive)
    assert manifest.read_text() == "kept"


def test_an_earlier_call_is_continued(checkout, monkeypatch):
    given = []
    monkeypatch.setattr(compare, "main", lambda words: given.append(words) or 3)
    (checkout / "gpu/runs.jsonl").write_text("earlier\n")
    options = ["--output", "out", "--studies", "a", "--jobs", "5", "--minutes", "4"]
    monkeypatch.setattr(sys, "argv", ["evidence.py", "gpu", *options])
    assert evidence.main() == 3
    assert (checkout / "out/runs.jsonl").read_text() == "earlier\n"
    words = given[0]
    assert words[words.index("--studies") + 1 : words.index("--study-file")] == ["a"]
    assert words[words.index("--jobs") + 1] == "5"
    assert 3.5 < float(words[words.index("--minutes") + 1]) <= 4.0
    assert words[words.index("--results") + 1] == "out/runs.jsonl"
