"""Encoders that are shared: as a folder, and over the hub, which is a folder here."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastreid_uns.config import load_config
from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile, MissingPackage, UnknownName
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.predictor import FeatureExtractor, load_run

IMAGES = torch.randint(0, 256, (3, 3, 32, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
ROOT = Path(__file__).parents[1]
METHODS = sorted(ROOT.glob("projects/*/configs/synthetic.yaml"))
FILES = {"README.md", "config.yaml", "model.safetensors"}
COMMIT = "0" * 40


def make_run(folder: Path, *keys: str) -> Path:
    """An output folder of a network whose momentum encoder, the one that is used, differs from the other one."""
    cfg = load_config(
        None, ["INPUT.SIZE=[32, 16]", "MODEL.BACKBONE.NAME=SmallNet", "MODEL.MOMENTUM_ENCODER=true", *keys]
    )
    torch.manual_seed(0)
    model = build_model(cfg, 7).eval()
    with torch.no_grad():
        for parameter in model.teacher.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    folder.mkdir()
    torch.save({"model": model.state_dict(), "config": cfg.dump(), "num_images": 7}, folder / "checkpoint_0003.pth")
    (folder / "last").write_text("checkpoint_0003.pth\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("private") / "run"
    secret = folder.parent / "secret place"
    return make_run(folder, f"OUTPUT_DIR={folder}", "DATASETS.TRAIN.NAME=folder", f"DATASETS.TRAIN.ROOT={secret}/okapi")


@pytest.fixture(scope="module")
def expected(run) -> torch.Tensor:
    return FeatureExtractor.from_checkpoint(run, device="cpu")(IMAGES)


@pytest.fixture
def published(run, tmp_path) -> Path:
    FeatureExtractor.from_checkpoint(run, device="cpu").save_pretrained(tmp_path / "animals")
    return tmp_path / "animals"


def test_a_folder_gives_the_same_features(published, expected):
    assert {file.name for file in published.iterdir()} == FILES
    for source in (published, str(published), published / "model.safetensors"):
        extractor = FeatureExtractor.from_pretrained(source, device="cpu")
        assert torch.equal(extractor(IMAGES), expected)
    assert torch.equal(FeatureExtractor.from_checkpoint(published, device="cpu")(IMAGES), expected)
    assert torch.equal(load_run(published)[1].extract(IMAGES)["feats"], expected)


def test_it_can_be_published_again(published, expected, tmp_path):
    FeatureExtractor.from_pretrained(published, device="cpu").save_pretrained(tmp_path / "again")
    assert torch.equal(FeatureExtractor.from_pretrained(tmp_path / "again", device="cpu")(IMAGES), expected)


@pytest.mark.parametrize("file", METHODS, ids=lambda file: file.parents[1].name)
def test_the_encoder_of_each_method(file, tmp_path):
    """None of its tensors depends on how many images it was trained on."""
    cfg = load_config(file, ["OUTPUT_DIR=/somewhere/else"])
    model = build_model(cfg, 300).eval()
    torch.save({"model": model.state_dict(), "config": cfg.dump(), "num_images": 300}, tmp_path / "a.pth")
    extractor = FeatureExtractor.from_checkpoint(tmp_path / "a.pth", device="cpu")
    extractor.save_pretrained(tmp_path / "shared")
    images = torch.rand(2, 3, *cfg.INPUT.SIZE, generator=torch.Generator().manual_seed(2))
    again = FeatureExtractor.from_pretrained(tmp_path / "shared", device="cpu")
    assert torch.equal(again(images), extractor(images))


def test_a_checkpoint_of_version_0_1(tmp_path):
    file = ROOT / "tests/golden/acfl_0.1.pth"
    FeatureExtractor.from_checkpoint(file, device="cpu").save_pretrained(tmp_path / "shared")
    images = (torch.arange(2 * 3 * 32 * 16) % 251).reshape(2, 3, 32, 16).to(torch.uint8)
    expected = torch.load(file, weights_only=True)["golden_feats"]
    found = FeatureExtractor.from_pretrained(tmp_path / "shared", device="cpu")(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_only_the_encoder_goes_out(published, run):
    """No memory, no classifier, no second encoder, and no folder of the machine."""
    _, model = load_run(run)
    assert load_file(published / "model.safetensors").keys() == model.teacher.state_dict().keys()
    for file in ("config.yaml", "README.md"):
        text = (published / file).read_text()
        assert "secret place" not in text
        assert str(run.parent) not in text.replace(str(published), "")
    cfg = yaml.safe_load((published / "config.yaml").read_text())
    assert cfg["DATASETS"]["TRAIN"]["ROOT"] == "okapi"


def test_the_card_tells_how_to_use_it(published):
    card = (published / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "fastreid_uns"
    assert f'FeatureExtractor.from_pretrained("{published}")' in card
    assert "# animals" in card
    assert "32 x 16 pixels" in card
    assert "mean [0.485, 0.456, 0.406]" in card


def test_nothing_is_overwritten_unasked(published, run):
    extractor = FeatureExtractor.from_checkpoint(run, device="cpu")
    with pytest.raises(InvalidState, match=r"animals: model\.safetensors, config\.yaml, README\.md exists already"):
        extractor.save_pretrained(published)
    extractor.save_pretrained(published, overwrite=True)
    with pytest.raises(InvalidState, match="holds a run"):
        extractor.save_pretrained(run, overwrite=True)
    (published.parent / "file").write_text("")
    with pytest.raises(InvalidState, match="cannot be written"):
        extractor.save_pretrained(published.parent / "file" / "deeper")


def test_an_encoder_of_unknown_make_is_not_published(tmp_path):
    extractor = FeatureExtractor(torch.nn.Identity(), (8, 8), device="cpu")
    with pytest.raises(InvalidState, match="Make the extractor with from_checkpoint"):
        extractor.save_pretrained(tmp_path / "x")


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:2000])


def foreign(file: Path) -> None:
    save_file({"weight": torch.zeros(3)}, file)


def later(file: Path) -> None:
    with safe_open(file, framework="pt") as content:
        told = json.loads(content.metadata()["fastreid_uns"])
    save_file(load_file(file), file, metadata={"fastreid_uns": json.dumps({**told, "format": 9})})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip, "its tensors are not those that were written"),
        (cut, "damaged or cut off"),
        (foreign, "no encoder that this version"),
        (later, "If another one wrote it, install that"),
    ],
)
def test_damaged_and_foreign_weights_are_refused(published, damage, message):
    damage(published / "model.safetensors")
    with pytest.raises(InvalidValue, match=message):
        FeatureExtractor.from_pretrained(published)


def test_a_missing_or_other_config_is_refused(published):
    text = (published / "config.yaml").read_text()
    (published / "config.yaml").write_text(text.replace("NAME: SmallNet", "NAME: SmallNett"))
    with pytest.raises(UnknownName, match="SmallNett"):
        FeatureExtractor.from_pretrained(published)
    (published / "config.yaml").write_text(re.sub(r"WIDTH: \d+", "WIDTH: 24", text))
    with pytest.raises(InvalidValue, match="was made with another model"):
        FeatureExtractor.from_pretrained(published)
    (published / "config.yaml").unlink()
    with pytest.raises(MissingFile, match=r"config\.yaml: there is no such file"):
        FeatureExtractor.from_pretrained(published / "model.safetensors")


PLUGIN = """
from pathlib import Path
from fastreid_uns.modeling.heads import EmbeddingHead
from fastreid_uns.registry import HEAD_REGISTRY

Path(__file__).with_name("has_run").touch()

if "{head}" not in HEAD_REGISTRY:
    @HEAD_REGISTRY.register()
    class {head}(EmbeddingHead):
        pass
"""


def test_code_of_a_plugin_runs_only_when_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plugin = tmp_path / "our_parts"
    plugin.mkdir()
    (plugin / "__init__.py").write_text(PLUGIN.format(head="HeadOfThisTest"))
    folder = make_run(tmp_path / "run", f"PLUGINS=[{plugin}]", "MODEL.HEAD.NAME=HeadOfThisTest")
    extractor = FeatureExtractor.from_checkpoint(folder, plugins=[str(plugin)], device="cpu")
    extractor.save_pretrained(tmp_path / "animals")
    assert yaml.safe_load((tmp_path / "animals/config.yaml").read_text())["PLUGINS"] == ["./our_parts"]
    from fastreid_uns.registry import HEAD_REGISTRY

    monkeypatch.delitem(HEAD_REGISTRY._obj_map, "HeadOfThisTest")
    for name in [name for name in sys.modules if name.startswith("our_parts")]:
        monkeypatch.delitem(sys.modules, name)
    (plugin / "has_run").unlink()
    with pytest.raises(UnknownName, match=r"HeadOfThisTest.*names the plugin \./our_parts.*pass trust=True"):
        FeatureExtractor.from_pretrained(tmp_path / "animals")
    assert not (plugin / "has_run").exists()
    again = FeatureExtractor.from_pretrained(tmp_path / "animals", plugins=[str(plugin)], device="cpu")
    assert torch.equal(again(IMAGES), extractor(IMAGES))
    assert (plugin / "has_run").exists()


class FakeHub:
    """What `push` calls of `huggingface_hub.HfApi`; repositories are in the cache from which downloads are read."""

    def __init__(self, cache: Path) -> None:
        self.cache, self.private = cache, {}

    def snapshot(self, repo: str) -> Path:
        return self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.private.setdefault(repo, private)
        self.snapshot(repo).mkdir(parents=True, exist_ok=True)
        refs = self.snapshot(repo).parents[1] / "refs"
        refs.mkdir(exist_ok=True)
        (refs / "main").write_text(COMMIT)

    def file_exists(self, repo: str, name: str) -> bool:
        return (self.snapshot(repo) / name).is_file()

    def upload_folder(self, *, repo_id: str, folder_path: str, ignore_patterns: list[str], commit_message: str) -> None:
        for file in Path(folder_path).iterdir():
            if not any(fnmatch(file.name, pattern) for pattern in ignore_patterns):
                shutil.copy(file, self.snapshot(repo_id) / file.name)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> FakeHub:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")
    constants = importlib.import_module("huggingface_hub.constants")
    fake = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(fake.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    return fake


def test_what_is_pushed_comes_back(run, expected, hub):
    from fastreid_uns.hub import push

    assert push(run, "me/animals") == "hub:me/animals"
    assert hub.private == {"me/animals": True}
    assert {file.name for file in hub.snapshot("me/animals").iterdir()} == FILES
    for source in ("hub:me/animals", "me/animals", f"hub:me/animals@{COMMIT}", "hub:me/animals@main"):
        assert torch.equal(FeatureExtractor.from_pretrained(source, device="cpu")(IMAGES), expected)
    assert torch.equal(FeatureExtractor.from_checkpoint("hub:me/animals", device="cpu")(IMAGES), expected)
    card = hub.snapshot("me/animals") / "README.md"
    assert 'from_pretrained("hub:me/animals")' in card.read_text()


def test_a_card_that_somebody_wrote_stays(run, hub):
    from fastreid_uns.hub import push

    hub.create_repo("me/animals", private=False, exist_ok=True)
    card = hub.snapshot("me/animals") / "README.md"
    card.write_text("# Okapis of the north")
    push(run, "hub:me/animals")
    assert card.read_text() == "# Okapis of the north"
    assert (hub.snapshot("me/animals") / "model.safetensors").is_file()


def test_what_the_hub_does_not_have_is_named(run, hub):
    with pytest.raises(InvalidState, match="hub:me/nothing: it could not be fetched"):
        FeatureExtractor.from_pretrained("hub:me/nothing")
    with pytest.raises(InvalidState, match="hub:a/b/c: it could not be fetched"):
        FeatureExtractor.from_checkpoint("hub:a/b/c")
    hub.create_repo("me/other", private=False, exist_ok=True)
    (hub.snapshot("me/other") / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(MissingFile, match=r"hub:me/other: there is no model\.safetensors with a config\.yaml"):
        FeatureExtractor.from_pretrained("me/other")
    with pytest.raises(FileNotFoundError, match=r"none\.pth does not exist"):
        FeatureExtractor.from_pretrained("runs/of/none.pth")


def test_a_refusal_of_the_hub_is_told(run, hub, monkeypatch):
    from huggingface_hub.errors import LocalTokenNotFoundError

    from fastreid_uns.hub import push

    def refuse(*_, **__):
        raise LocalTokenNotFoundError("Token is required")

    monkeypatch.setattr(hub, "create_repo", refuse)
    with pytest.raises(InvalidState, match=r"me/animals could not be written \(Token is required\).*hf auth login"):
        push(run, "me/animals")


def test_missing_network_errors_are_those_of_the_library():
    errors = pytest.importorskip("huggingface_hub.errors", reason="needs the extra `hub`")
    from fastreid_uns.published import hub_failures

    library = importlib.import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
    assert issubclass(library.ConnectError, hub_failures())
    assert issubclass(errors.HfHubHTTPError, hub_failures())


def test_the_missing_package_is_named(run, monkeypatch):
    from fastreid_uns.hub import push

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackage, match=r"pip install 'fastreid_uns\[hub\]'"):
        FeatureExtractor.from_pretrained("hub:me/animals")
    with pytest.raises(MissingPackage, match=r"pip install 'fastreid_uns\[hub\]'"):
        push(run, "me/animals")
