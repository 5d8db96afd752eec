"""The scaffold writes a project that loads, passes its own test, trains, and is clean."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import fastreid_uns.projects
from fastreid_uns.commands import new_project
from fastreid_uns.config import load_config

REPOSITORY = Path(__file__).parents[2]
WRITTEN = ["README.md", "__init__.py", "configs/synthetic.yaml", "losses.py"]


@pytest.fixture
def tool():
    return new_project


@pytest.fixture
def checkout(tool, tmp_path, monkeypatch) -> Path:
    """A checkout in which the tool may write into projects/."""
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    (tmp_path / "projects").mkdir()
    (tmp_path / "projects/README.md").touch()  # what tells a checkout from an installed package
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(fastreid_uns.projects, "__path__", [str(tmp_path / "projects")])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("fastreid_uns.projects."):
            del sys.modules[name]


def files_below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in (".py", ".yaml", ".md"))


def test_project_of_the_checkout_trains(tool, checkout, tiny, capsys):
    from fastreid_uns.engine.default import DefaultTrainer

    assert tool.main(["Spread", "--into", str(checkout / "projects")]) == 0
    folder = checkout / "projects/Spread"
    assert files_below(folder) == [*WRITTEN, "tests/test_Spread.py"]
    config = yaml.safe_load((folder / "configs/synthetic.yaml").read_text())
    assert config["_BASE_"] == "../../../configs/quickstart.yaml"
    assert config["PLUGINS"] == ["fastreid_uns.projects.Spread"]
    assert "--config-file projects/Spread/configs/synthetic.yaml\n" in capsys.readouterr().out
    trainer = DefaultTrainer(load_config(folder / "configs/synthetic.yaml", [*tiny, "SOLVER.EPOCHS=1"]))
    trainer.train()
    assert 0 <= trainer.metrics["loss_spread"] < 0.1  # the weight times a value in [0, 1]


def test_project_elsewhere_passes_its_own_test(tool, tmp_path, capsys):
    assert tool.main(["my_method", "--into", str(tmp_path / "mine")]) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "mine/my_method"
    config = folder / "configs/synthetic.yaml"
    assert f"--config-file {config}\n" in printed
    assert load_config(config).MODEL.LOSSES.spread.NAME == "my_methodLoss"
    assert pytest.main(["-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(folder)]) == 0
    assert "5 passed" in capsys.readouterr().out


def test_written_code_is_clean(tool, tmp_path):
    pytest.importorskip("ruff")
    folder = tool.write_project("Clean", tmp_path)
    settings = ["--no-cache", "--config", str(REPOSITORY / "pyproject.toml"), str(folder)]
    for arguments in (["check"], ["format", "--check"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *arguments, *settings], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    assert not [file for file in files_below(folder) if re.search("@[A-Z]+@", (folder / file).read_text())]


@pytest.mark.parametrize("name", ["my-paper", "3C", "class", "", "a/b"])
def test_a_name_that_python_cannot_import_is_refused(tool, tmp_path, capsys, name):
    assert tool.main([name, "--into", str(tmp_path)]) == 2
    assert f"{name!r} is no Python name; letters, digits and _ are accepted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_left_alone(tool, tmp_path, capsys):
    (tmp_path / "Held").mkdir()
    assert tool.main(["Held", "--into", str(tmp_path)]) == 2
    assert "Held exists; nothing was written. Choose another name" in capsys.readouterr().err
    assert list((tmp_path / "Held").iterdir()) == []
