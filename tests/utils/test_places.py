"""`~` is the home folder wherever a path can be typed."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import fastreid_uns.builtin  # noqa: F401  (fills the registries)
from fastreid_uns.bounds import BOUNDS, PATH
from fastreid_uns.config import load_config
from fastreid_uns.photos.store import PhotoRun
from fastreid_uns.predictor import find_checkpoint, list_images
from fastreid_uns.pseudo_labels.constraints import read_answers
from fastreid_uns.registry import DATASET_REGISTRY, HOOK_REGISTRY
from fastreid_uns.utils.places import expanded, path_of

ROOT = Path(__file__).parents[2]
FRAME = ["OUTPUT_DIR", *(key for key, bound in BOUNDS.items() if bound is PATH)]
SETS = [
    (name, key.upper())
    for name, _ in DATASET_REGISTRY
    for key in ("root", "path", "folder")
    if key in DATASET_REGISTRY.schema(name)
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def at(cfg, key):
    for name in key.split("."):
        cfg = cfg[name]
    return cfg


def test_what_is_a_path_in_the_home_folder(home):
    assert expanded("~/x") == f"{home}/x"
    assert path_of("~/") == home
    for text in ("a~/b", "/x/~", "~nobody-of-that-name/x", "hub:user/name", "https://a.b/~c", "", "a", "~"):
        assert expanded(text) == text


@pytest.mark.parametrize("key", FRAME)
def test_keys_of_the_frame(home, tmp_path, key):
    assert at(load_config(overrides=[key, "~/x"]), key) == f"{home}/x"
    tree = "~/x"
    for name in reversed(key.split(".")):
        tree = {name: tree}
    (tmp_path / "a.yaml").write_text(json.dumps(tree))
    assert at(load_config(tmp_path / "a.yaml"), key) == f"{home}/x"


@pytest.mark.parametrize(("name", "key"), SETS)
@pytest.mark.parametrize("place", ["DATASETS.TRAIN", "DATASETS.TESTS.a", "DATASETS.SOURCES.a"])
def test_keys_of_data_sets(home, name, key, place):
    given = {"NAME": name, key: "~/x", **({"PATH": "a.csv"} if name == "csv_file" and key != "PATH" else {})}
    assert at(load_config(overrides=[place, json.dumps(given)]), f"{place}.{key}") == f"{home}/x"


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, key)
        for name, _ in HOOK_REGISTRY
        for key in ("WEIGHTS", "FOLDER")
        if key.lower() in HOOK_REGISTRY.schema(name)
    ],
)
def test_keys_of_hooks(home, name, key):
    overrides = [f"HOOKS.a={json.dumps({'NAME': name, key: '~/x'})}"]
    assert at(load_config(overrides=overrides), f"HOOKS.a.{key}") == f"{home}/x"


def test_configs_bases_and_plugins(home):
    (home / "plugin").mkdir()
    (home / "plugin/__init__.py").write_text("")
    (home / "base.yaml").write_text("SEED: 7\nPLUGINS: [~/plugin]\n")
    (home / "a.yaml").write_text("_BASE_: ~/base.yaml\n")
    cfg = load_config("~/a.yaml")
    plugins = [str(home / "plugin")]
    assert cfg.SEED == 7
    assert cfg.PLUGINS == load_config(overrides=["PLUGINS", "[~/plugin]"]).PLUGINS == plugins


def test_answers(home):
    (home / "answers.csv").write_text("first,second,answer\na.jpg,b.jpg,same\n")
    (answer,) = read_answers(["~/answers.csv"], ["a.jpg", "b.jpg"])
    assert (answer.first, answer.second, answer.same) == (0, 1, True)


def test_paths_of_the_python_interface(home):
    assert find_checkpoint("~/a.pth") == f"{home}/a.pth"
    (home / "a.jpg").touch()
    assert list_images("~/a.jpg") == [f"{home}/a.jpg"]
    assert [Path(path).name for path in list_images("~/")] == ["a.jpg"]
    (home / "run.json").write_text("{}")
    assert PhotoRun("~/").folder == home


def test_no_command_has_an_argument_that_is_taken_as_it_is_typed():
    parsers = [*ROOT.glob("fastreid_uns/commands/*.py"), ROOT / "tools/demo.py", ROOT / "tools/evidence.py"]
    calls = [
        (file.name, node.args[0].value, {word.arg: ast.unparse(word.value) for word in node.keywords})
        for file in parsers
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument")
        if isinstance(node.args[0], ast.Constant)
    ]
    types = {(file, name): words.get("type") for file, name, words in calls}
    assert "Path" not in types.values()
    assert {types["group.py", "photos"], types["add.py", "output"], types["search.py", "index"]} == {"path_of"}
