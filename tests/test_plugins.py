import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from fastreid_uns import plugins
from fastreid_uns.config import load_config
from fastreid_uns.registry import LOSS_REGISTRY

ROOT = Path(__file__).parents[1]
LOSS = """
from torch import nn
from fastreid_uns.registry import LOSS_REGISTRY

@LOSS_REGISTRY.register()
class {name}(nn.Module):
    def __init__(self, *, scale=2.0):
        super().__init__()
        self.scale = scale

    def forward(self, feats):
        return self.scale * feats.mean()
"""


def make_folder(folder: Path, name: str, loss: str) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("from . import parts\n\ndef add_config(cfg):\n    cfg.STAGES = [1]\n")
    (folder / name / "parts.py").write_text(LOSS.format(name=loss))
    return folder / name


def test_folder_next_to_the_yaml(tmp_path, monkeypatch):
    make_folder(tmp_path, "mine", "LossOfFolder")
    file = tmp_path / "a.yaml"
    file.write_text("PLUGINS: [./mine]\nMODEL: {LOSSES: {own: {NAME: LossOfFolder}}}\nSTAGES: [2, 3]\n")
    monkeypatch.chdir("/")
    cfg = load_config(file)
    assert cfg.MODEL.LOSSES.own.SCALE == 2.0
    assert cfg.STAGES == [2, 3]
    dumped = tmp_path / "elsewhere"
    dumped.mkdir()
    (dumped / "config.yaml").write_text(cfg.dump())
    assert load_config(dumped / "config.yaml") == cfg


def test_equal_module_names_in_two_folders_do_not_clash(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        make_folder(tmp_path / name, "same", f"LossOf{name.title()}")
    plugins.load_plugins([str(tmp_path / "one" / "same"), str(tmp_path / "two" / "same")])
    assert LOSS_REGISTRY.get("LossOfOne") is not LOSS_REGISTRY.get("LossOfTwo")


def test_installed_entry_point(tmp_path, monkeypatch):
    make_folder(tmp_path, "packaged_method", "LossOfEntryPoint")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("published", "packaged_method", plugins.GROUP)
    monkeypatch.setattr(
        plugins, "entry_points", lambda group, name=None: [point] if name in (None, "published") else []
    )
    plugins.load_plugins(["published"])
    assert LOSS_REGISTRY.get("LossOfEntryPoint")


def test_projects_of_the_checkout_are_importable_by_their_dotted_name():
    import fastreid_uns.projects

    assert str(ROOT / "projects") in list(fastreid_uns.projects.__path__)


def test_unknown_plugin_says_what_was_tried():
    with pytest.raises(ImportError, match=r"'no_such_method' is no module.*no entry point.*\./no_such_method"):
        plugins.load_plugins(["no_such_method"])


def test_folder_without_init(tmp_path):
    with pytest.raises(ImportError, match=r"has no __init__\.py"):
        plugins.load_plugins([str(tmp_path)])


def test_a_folder_that_has_moved(tmp_path):
    with pytest.raises(ImportError, match=r"folder .*gone does not exist\. Name the place to which it was moved"):
        plugins.load_plugins([str(tmp_path / "gone")])


def test_an_import_that_fails_inside_a_plugin_is_not_hidden(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "__init__.py").write_text("import a_library_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_missing"):
        plugins.load_plugins([str(folder)])


def test_importing_the_package_is_quick():
    code = "import sys, fastreid_uns; print(any(m in sys.modules for m in ('torch', 'numpy', 'yaml')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
