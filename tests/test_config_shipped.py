"""The configs that ship with the package are found by their names, from a checkout and from a wheel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastreid_uns.config import load_config
from fastreid_uns.config.shipped import shipped_configs
from fastreid_uns.utils.places import shipped_root

ROOT = Path(__file__).parents[1]
MARKET = "projects/ACFL/configs/market.yaml"


def test_a_shipped_config_is_found_from_anywhere(tmp_path, monkeypatch):
    expected = load_config(ROOT / MARKET)
    monkeypatch.chdir(tmp_path)
    assert load_config(MARKET) == load_config(Path(MARKET)) == expected
    (tmp_path / "mine.yaml").write_text(f"_BASE_: {MARKET}\nSEED: 3")
    assert load_config("mine.yaml", ["SEED=1"]) == expected


def test_a_file_of_the_working_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / MARKET).parent.mkdir(parents=True)
    (tmp_path / MARKET).write_text("SEED: 7")
    assert load_config(MARKET).SEED == 7


def test_a_near_name_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"markt\.yaml does not exist; did you mean {MARKET}\? Check the path"):
        load_config("projects/ACFL/configs/markt.yaml")
    with pytest.raises(FileNotFoundError, match="cannot be fetched"):
        load_config("http://127.0.0.1:9/a.yaml")


def test_nothing_outside_of_the_package_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outside = "configs/../setup.py"
    assert (shipped_root() / outside).is_file()
    with pytest.raises(FileNotFoundError):
        load_config(outside)


def test_every_yaml_ships():
    files = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/*/configs/**/*.yaml")]
    assert shipped_configs() == sorted(str(file.relative_to(ROOT)) for file in files)
    assert len(files) > 200


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("fastreid_uns", "projects", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "golden"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*build, "-w", str(folder)], cwd=source, capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("needs pip")
    assert done.returncode == 0, done.stderr[-3000:]
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_holds_every_module_and_every_config(wheel):
    package = [path for path in ROOT.glob("fastreid_uns/**/*") if path.is_file() and "__pycache__" not in path.parts]
    beside = [*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("projects/*/configs/**/*.yaml")]
    beside += [
        *(path for path in ROOT.glob("projects/*/*.py") if path.name != "conftest.py"),
        *ROOT.glob("projects/*/README.md"),
    ]
    missing = [path for path in package if not (wheel / path.relative_to(ROOT)).is_file()]
    missing += [path for path in beside if not (wheel / "fastreid_uns" / path.relative_to(ROOT)).is_file()]
    assert not missing


def test_an_installed_wheel_finds_its_configs(wheel, tmp_path):
    code = (
        "import fastreid_uns\nfrom fastreid_uns.config import load_config\n"
        "from fastreid_uns.config.shipped import shipped_configs\n"
        f"print(fastreid_uns.__file__, load_config({MARKET!r}).MODEL.NAME, len(shipped_configs()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(wheel)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    where, name, count = done.stdout.split()
    assert Path(where).is_relative_to(wheel)
    assert name == "ACFL"
    assert int(count) == len(shipped_configs())


@pytest.mark.slow
def test_the_commands_of_an_installed_wheel(wheel, tmp_path):
    """Outside of the checkout: help, a run on photos, and a shipped config as far as its missing data set."""
    photos = tmp_path / "my photos"
    photos.mkdir()
    for thing in range(4):
        pattern = np.kron(np.random.default_rng(thing).integers(0, 256, (4, 4, 3)), np.ones((16, 16, 1)))
        for number in range(5):
            noise = np.random.default_rng([thing, number]).normal(0, 8, pattern.shape)
            pixels = np.clip(pattern + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(photos / f"{thing}-{number}.jpg")

    def command(*words: str) -> subprocess.CompletedProcess:
        start = f"import sys; from fastreid_uns.commands import main; sys.exit(main({list(words)!r}))"
        environment = {**os.environ, "PYTHONPATH": str(wheel)}
        return subprocess.run(
            [sys.executable, "-c", start], cwd=tmp_path, capture_output=True, text=True, env=environment
        )

    shown = command("--help")
    assert shown.returncode == 0
    assert all(name in shown.stdout for name in ("group", "review", "add", "identify", "serve", "train"))
    grouped = command("group", "my photos", "--no-questions", "--output", "out", "--size", "64", "64")
    assert grouped.returncode == 0, grouped.stderr[-3000:]
    assert "20 photos together" in grouped.stdout
    assert "next:     fastreid-uns review out" in grouped.stdout
    assert (tmp_path / "out" / "report.html").is_file()
    identified = command("identify", "out", "my photos/2-3.jpg", "--json")
    assert json.loads(identified.stdout)["answer"] in ("known", "new", "unsure"), identified.stderr
    trained = command("train", "--config-file", MARKET)
    assert trained.returncode == 2
    assert "Market" in trained.stderr
    assert "Traceback" not in trained.stderr
