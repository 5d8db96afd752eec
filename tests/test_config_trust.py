"""What is imported because a checkpoint names it, and what a run is good for when parts of it are gone."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from fastreid_uns import plugins
from fastreid_uns.commands.report import Options, make_report
from fastreid_uns.config import load_config, parse_config
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.predictor import FeatureExtractor, load_run
from fastreid_uns.registry import DATASET_REGISTRY, HOOK_REGISTRY, LOSS_REGISTRY, SAMPLER_REGISTRY

NETWORK = ["INPUT.SIZE=[32, 16]", "MODEL.BACKBONE.NAME=SmallNet", "MODEL.BACKBONE.WIDTH=4"]
PARTS = """
from pathlib import Path
from torch import nn
from fastreid_uns.registry import LOSS_REGISTRY

Path(__file__).with_name("imported").touch()

@LOSS_REGISTRY.register()
class {loss}(nn.Module):
    def __init__(self, *, scale=2.0):
        super().__init__()

    def forward(self, feats):
        return feats.mean()
"""


@pytest.fixture
def folder(tmp_path):
    """A plugin folder that leaves a mark when it is imported, forgotten afterwards."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "__init__.py").write_text(PARTS.format(loss="LossOfMine"))
    yield folder
    LOSS_REGISTRY._obj_map.pop("LossOfMine", None)


def forget(folder: Path) -> None:
    """As a new process would find it."""
    LOSS_REGISTRY._obj_map.pop("LossOfMine", None)
    for name in [name for name in sys.modules if name.startswith(f"{folder.name}_")]:
        del sys.modules[name]
    (folder / "imported").unlink(missing_ok=True)


def save(cfg, file: Path) -> Path:
    model = build_model(cfg, 7)
    torch.save({"model": model.state_dict(), "config": cfg.dump(), "num_images": 7}, file)
    return file


@pytest.fixture
def run(folder, tmp_path) -> Path:
    """A checkpoint whose model needs the plugin folder."""
    keys = [f"PLUGINS=[{folder}]", "MODEL.LOSSES.own.NAME=LossOfMine"]
    file = save(load_config(overrides=[*NETWORK, *keys]), tmp_path / "x.pth")
    forget(folder)
    return file


def test_a_folder_is_not_imported_because_a_checkpoint_names_it(run, folder):
    text = torch.load(run, weights_only=True)["config"]
    with pytest.raises(ValueError, match=rf"x\.pth: its config names the plugin {folder}.*trust=True.*plugins="):
        parse_config(text, run.name)
    for load in (load_run, FeatureExtractor.from_checkpoint):
        with pytest.raises(KeyError, match=rf"'LossOfMine' is unknown.*Not imported: .*{folder}.*trust=True"):
            load(run)
    assert not (folder / "imported").exists()


def test_a_folder_is_imported_when_the_user_says_so(run, folder):
    _, model = load_run(run, trust=True)
    assert type(model.losses).__name__ == "LossSet"
    assert (folder / "imported").exists()
    assert FeatureExtractor.from_checkpoint(run, trust=True, device="cpu").size == (32, 16)


def test_a_folder_that_has_moved_is_named_instead(run, folder, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "mine")
    with pytest.raises(KeyError, match=r"LossOfMine.*Not imported: PLUGINS: the folder .*mine does not exist"):
        load_run(run, trust=True)
    _, model = load_run(run, plugins=[str(moved)])
    assert model.num_images == 7
    forget(moved)
    monkeypatch.chdir(tmp_path)
    assert FeatureExtractor.from_checkpoint(run, plugins=["./elsewhere/mine"], device="cpu").size == (32, 16)


def test_a_module_of_the_working_directory_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = load_config(overrides=NETWORK).dump().replace("PLUGINS: []", "PLUGINS: [planted, antigravity, ./planted]")
    with pytest.raises(ValueError, match=r"names the plugin planted, antigravity, \./planted, which is code"):
        parse_config(text, "x.pth")
    assert parse_config(text, "x.pth", model_only=True).PLUGINS == []
    assert "planted" not in sys.modules
    assert "antigravity" not in sys.modules


def test_what_ships_or_is_installed_needs_no_trust(monkeypatch):
    text = load_config(overrides=[*NETWORK, "PLUGINS=[fastreid_uns.projects.ICE]"]).dump()
    assert parse_config(text).PLUGINS == ["fastreid_uns.projects.ICE"]
    point = EntryPoint("published", "fastreid_uns.projects.ICL", plugins.GROUP)
    found = lambda group, name=None: [point] if name in (None, "published") else []  # noqa: E731
    monkeypatch.setattr(plugins, "entry_points", found)
    assert parse_config(text.replace("fastreid_uns.projects.ICE", "published")).PLUGINS == ["published"]
    assert plugins.is_installed("numpy")
    assert not plugins.is_installed("")


def test_an_unneeded_folder_is_left_out(folder, tmp_path):
    file = save(load_config(overrides=[*NETWORK, f"PLUGINS=[{folder}]"]), tmp_path / "x.pth")
    forget(folder)
    load_run(file)
    assert not (folder / "imported").exists()


@pytest.fixture
def private(monkeypatch):
    """Parts that the user's own script registers; calling it is what a process without the script knows."""

    def photos(*, root: str):
        raise AssertionError("no data is needed")

    class Private:
        def __init__(self, *args: object, level: int = 3):
            pass

    registered = {DATASET_REGISTRY: photos, HOOK_REGISTRY: Private, SAMPLER_REGISTRY: Private}
    for registry, part in registered.items():
        monkeypatch.setitem(registry._obj_map, part.__name__, part)
    return lambda: [registry._obj_map.pop(part.__name__) for registry, part in registered.items()]


def test_a_run_is_of_use_without_its_data_set_sampler_and_hook(private, tmp_path, capsys):
    keys = ["DATASETS.TRAIN={NAME: photos, ROOT: here}", "DATASETS.TESTS={mine: {NAME: photos, ROOT: there}}"]
    keys += ["DATALOADER.SAMPLER.NAME=Private", "HOOKS.own.NAME=Private"]
    cfg = load_config(overrides=[*NETWORK, *keys])
    file = save(cfg, tmp_path / "x.pth")
    private()
    with pytest.raises(KeyError, match="'photos' is unknown"):
        parse_config(cfg.dump())
    kept = parse_config(cfg.dump(), model_only=True)
    assert kept == cfg
    images = torch.randint(0, 256, (2, 3, 32, 16), dtype=torch.uint8)
    assert FeatureExtractor.from_checkpoint(file, device="cpu")(images).shape[0] == 2
    with pytest.raises(ValueError, match="nothing to show"):
        make_report(file, tmp_path / "report", Options(parts=("ranks", "clusters")))
    said = capsys.readouterr().err
    for part in ("ranks and map", "clusters"):
        assert f"{part} left out: no plugin here registers the data set photos; see --plugins" in said


def test_keys_of_a_plugin_that_is_gone_are_kept_where_no_model_needs_them(tmp_path):
    text = load_config(overrides=NETWORK).dump() + "STAGES: {FIRST: 3}\n"
    with pytest.raises(KeyError, match="unknown key STAGES"):
        parse_config(text)
    assert parse_config(text, model_only=True).STAGES.FIRST == 3
    with pytest.raises(KeyError, match=r"command line: unknown key STAGE\."):
        parse_config(text, overrides=["STAGE.FIRST=3"], model_only=True)
    with pytest.raises(KeyError, match=r"unknown key MODEL\.STAGES"):
        parse_config(text.replace("MODEL:\n", "MODEL:\n  STAGES: 3\n"), model_only=True)
