"""The type of a key decides what is typed for it."""

from __future__ import annotations

import pytest

from fastreid_uns.config import load_config, parse_config
from fastreid_uns.registry import DATASET_REGISTRY, HOOK_REGISTRY

TEXTS = [
    "run #2",
    "2024",
    "no",
    "null",
    "~",
    "2024-11-26",
    "a: b",
    "[x",
    "{x}",
    "1e-3",
    "010",
    "C:\\runs\\new",
    "it's",
    " padded ",
    "größe",
    "'quoted' twice'",
    "*alias",
    "!!python/name:os.system",
    "a=b",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["OUTPUT_DIR", "MODEL.WEIGHTS", "DATASETS.TRAIN.ROOT", "HOOKS.mine.FOLDER"])
def test_a_text_key_takes_any_text(key, text, registered):
    words = {"DATASETS.TRAIN.NAME": "folder", "DATASETS.TRAIN.ROOT": "x"}
    words |= {"HOOKS.mine.NAME": "HookWithText", "HOOKS.mine.FOLDER": "x", key: text}
    pairs = [word for pair in words.items() for word in pair]
    cfg = load_config(overrides=pairs)
    assert load_config(overrides=[f"{name}={value}" for name, value in words.items()]) == cfg
    node = cfg
    for part in key.split("."):
        node = node[part]
    assert node == text
    assert parse_config(cfg.dump()) == cfg


@pytest.fixture
def registered(monkeypatch):
    """A hook with a text key, of which the default does not tell the type."""

    class HookWithText:
        def __init__(self, *, folder: str):
            self.folder = folder

    monkeypatch.setitem(HOOK_REGISTRY._obj_map, "HookWithText", HookWithText)


@pytest.mark.parametrize("text", ["''", '""', ""])
def test_nothing_is_text_as_well(text):
    assert load_config(overrides=["MODEL.WEIGHTS", text]).MODEL.WEIGHTS == ""
    assert load_config(overrides=[f"MODEL.WEIGHTS={text}"]).MODEL.WEIGHTS == ""


def test_a_pair_of_quotes_around_all_of_it_is_no_part_of_the_text():
    assert load_config(overrides=["OUTPUT_DIR", '"run #2"']).OUTPUT_DIR == "run #2"
    assert load_config(overrides=["OUTPUT_DIR", "'a' and 'b'"]).OUTPUT_DIR == "'a' and 'b'"


@pytest.mark.parametrize("name", ["torchvision", '"torchvision"', "'torchvision'"])
def test_a_component_that_is_named_again_keeps_its_keys(name):
    """`configs/base.yaml` has a torchvision ResNet-50 whose last stage does not stride."""
    backbone = load_config("configs/base.yaml", ["MODEL.BACKBONE.NAME", name]).MODEL.BACKBONE
    assert (backbone.NAME, backbone.MODEL, backbone.LAST_STRIDE) == ("torchvision", "resnet50", 1)


def test_a_key_without_a_known_type_keeps_the_text_whole(monkeypatch):
    def photos(*, root, limit=None):
        return None

    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "photos", photos)
    train = load_config(
        overrides=["DATASETS.TRAIN.NAME=photos", "DATASETS.TRAIN.ROOT", "/data/shots #2"]
    ).DATASETS.TRAIN
    assert train == {"NAME": "photos", "ROOT": "/data/shots #2", "LIMIT": None}
    limit = "DATASETS.TRAIN.LIMIT"
    for text, value in {"7": 7, "0.5": 0.5, "true": True, "null": None, "[1, 2]": [1, 2], "[1": "[1"}.items():
        cfg = load_config(overrides=["DATASETS.TRAIN.NAME=photos", "DATASETS.TRAIN.ROOT=x", limit, text])
        assert value == cfg.DATASETS.TRAIN.LIMIT


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SEED", "7", 7),
        ("SEED", '"7"', 7),
        ("SOLVER.BASE_LR", "3e-4", 3e-4),
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.COMPILE", "true", True),
        ("SOLVER.COMPILE", "No", False),
        ("INPUT.SIZE", "[64, 32]", [64, 32]),
        ("INPUT.MEAN", "[0, 1e-2, 0.5]", [0.0, 0.01, 0.5]),
        ("INPUT.VIEWS", "[train, 2024, no, 'a b']", ["train", "2024", "no", "a b"]),
        ("LOG.WRITERS", "[]", []),
        ("SOLVER.OPTIMIZER_ARGS", "{momentum: 0.9, nesterov: true}", {"momentum": 0.9, "nesterov": True}),
        ("SOLVER.OPTIMIZER_ARGS.momentum", "0.9", {"momentum": 0.9}),
        ("MODEL.MEMORY", "null", {"NAME": ""}),
        ("MODEL.MEMORY.MOMENTUM", "0.5", None),
        ("DATASETS.TRAIN", '{"NAME": "folder", "ROOT": "run #2"}', None),
    ],
)
def test_other_keys_are_read_by_their_type(key, text, value):
    node = load_config(overrides=[key, text])
    for part in key.split(".")[: 2 if key.startswith("SOLVER.OPTIMIZER_ARGS") else None]:
        node = node[part]
    if value is not None:
        assert node == value
        assert type(node) is type(value) or isinstance(value, dict)
    elif key == "DATASETS.TRAIN":
        assert node.ROOT == "run #2"
    else:
        assert node == 0.5


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("SEED", "1.5", r"SEED is '1\.5', text; a whole number such as 1 is accepted\. Change"),
        ("SEED", "true", "SEED is 'true', text; a whole number"),
        ("SEED", "", "SEED is '', text; a whole number"),
        ("SOLVER.BASE_LR", "fast", r"BASE_LR is 'fast', text; a number such as 0\.00035"),
        ("SOLVER.COMPILE", "1", "COMPILE is '1', text; true or false such as False"),
        ("INPUT.SIZE", "256", r"SIZE is 256, a whole number; a list such as \[256, 128\]"),
        ("INPUT.SIZE", "[256, tall]", r"SIZE\[1\] is 'tall', text; a whole number such as 256"),
        ("INPUT.SIZE", "[256,", r"INPUT\.SIZE: no valid YAML"),
        ("SOLVER", "3", r"SOLVER is 3; a map of keys is accepted\. Leave it out"),
        ("PSEUDO_LABELS", "KMeansLabels", r"is 'KMeansLabels'; a map of keys is accepted\. Write {NAME: KMeansLabels}"),
        ("MODEL.LOSSES.extra", "SoftTripletLoss", r"a map of keys is accepted"),
    ],
)
def test_a_wrong_type_says_what_is_accepted(key, text, message):
    with pytest.raises(ValueError, match=rf"command line: .*{message}"):
        load_config(overrides=[key, text])


def test_a_text_key_of_a_file_needs_quotes_and_says_so(tmp_path):
    for written, shown in {"2024": "2024, a whole number", "no": "False, true or false", "null": "null"}.items():
        (tmp_path / "a.yaml").write_text(f"OUTPUT_DIR: {written}")
        with pytest.raises(ValueError, match=rf"a\.yaml: OUTPUT_DIR is {shown}; text such as .* Write it in quotes"):
            load_config(tmp_path / "a.yaml")
    (tmp_path / "a.yaml").write_text("OUTPUT_DIR: 2024-11-26")
    assert load_config(tmp_path / "a.yaml").OUTPUT_DIR == "2024-11-26"


def test_numbers_of_a_file_are_read_as_people_do(tmp_path):
    (tmp_path / "a.yaml").write_text("SOLVER: {EPOCHS: 010}")
    with pytest.raises(ValueError, match=r"EPOCHS is '010', text; a whole number"):
        load_config(tmp_path / "a.yaml")


def test_a_key_and_a_key_below_it_cannot_both_have_a_value():
    for words in (["MODEL.MEMORY", "null", "MODEL.MEMORY.MOMENTUM", "1"], ["SOLVER.EPOCHS", "1", "SOLVER", "{}"]):
        with pytest.raises(ValueError, match=r"command line: .* lies below .*, which has a value too"):
            load_config(overrides=words)


@pytest.mark.parametrize("missing", [["SEED"], ["SEED=1", "OUTPUT_DIR"]])
def test_a_key_without_a_value(missing):
    with pytest.raises(ValueError, match=f"command line: key '{missing[-1]}' has no value"):
        load_config(overrides=missing)
