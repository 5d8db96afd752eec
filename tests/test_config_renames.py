"""Keys and names of before: answered where a person writes, translated where a checkpoint holds them."""

from __future__ import annotations

import pytest
import yaml

from fastreid_uns.config import load_config, parse_config, renames
from fastreid_uns.config.schema import MAPS
from fastreid_uns.plugins import load_plugins

KEYS = {
    "PROTOCOL": ("{SOLVER: {EPOCHS: 60}}", "PAPER"),
    "LOG.PERIOD": ("7", "LOG.PERIOD_STEPS"),
    "MODEL.NORM_GROUP": ("8", "MODEL.GHOST_BATCH"),
    "MODEL.DOMAIN_NORM": ("true", "MODEL.DOMAIN_BN"),
    "MODEL.GUIDE_WEIGHT": ("0.5", "MODEL.PRETRAINED_WEIGHT"),
    "MODEL.RAW_QUERIES": ("true", "MODEL.UNNORMALIZED_QUERIES"),
    "INPUT.AUGMENTS.train.GREY": ("0.5", "INPUT.AUGMENTS.train.GRAY"),
}
VALUES = {
    "INPUT.CAMERA_STYLE.KIND": ("colours", "colors"),
    "TEST.RERANK": (True, "jaccard"),
    "HOOKS.mine.NAME": ("GuideHook", "PretrainedTeacherHook"),
    "MODEL.LOSSES.mine.NAME": ("RawTripletLoss", "UnnormalizedTripletLoss"),
}


def at(tree, path):
    for key in path.split("."):
        tree = tree[key]
    return tree


def nested(path: str, value: object) -> dict:
    for key in reversed(path.split(".")):
        value = {key: value}
    return value


def test_every_rename_is_tried_here():
    def pattern(path):
        return renames._pattern(path)

    assert {pattern(key) for key in KEYS} == set(renames.KEYS)
    assert {pattern(key) for key in VALUES} == set(renames.VALUES)
    assert set(renames._MAPS) <= set(MAPS)


@pytest.mark.parametrize("key", KEYS)
def test_an_old_key_is_answered_with_the_new_one(key, tmp_path):
    value, new = KEYS[key]
    message = rf"{key} was renamed to {new}\. Write the new name"
    with pytest.raises(KeyError, match=f"command line: {message}"):
        load_config(overrides=[f"{key}={value}"])
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(nested(key, yaml.safe_load(value))))
    with pytest.raises(KeyError, match=rf"a\.yaml: {message}"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("key", VALUES)
def test_an_old_name_is_answered_with_the_new_one(key, tmp_path):
    old, new = VALUES[key]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(nested(key, old)))
    with pytest.raises((ValueError, KeyError), match=rf"a\.yaml: {key}: {old} was renamed to {new}\. Write the new"):
        load_config(tmp_path / "a.yaml")


def test_a_checkpoint_is_translated():
    old: dict = {}
    for key, (value, _) in KEYS.items():
        put(old, key, yaml.safe_load(value))
    for key, (value, _) in VALUES.items():
        put(old, key, value)
    put(old, "PROTOCOL", {"MODEL": {"NORM_GROUP": 64}, "LOG": {"PERIOD": 3}})
    new = renames.translate(old)
    for key, (value, renamed) in KEYS.items():
        if key != "PROTOCOL":
            assert at(new, renamed) == yaml.safe_load(value)
    for key, (_, renamed) in VALUES.items():
        assert at(new, key) == renamed
    assert new["PAPER"] == {"MODEL": {"GHOST_BATCH": 64}, "LOG": {"PERIOD_STEPS": 3}}
    assert renames.translate(new) == new


def put(tree: dict, path: str, value: object) -> None:
    *parents, last = path.split(".")
    for key in parents:
        tree = tree.setdefault(key, {})
    tree[last] = value


def test_feed_and_cache_became_one_key():
    message = r"DATALOADER\.FEED was replaced by DATALOADER\.CACHE: none decodes in every epoch, device, host and disk"
    with pytest.raises(KeyError, match=message):
        load_config(overrides=["DATALOADER.FEED=cached"])
    text = load_config(overrides=["DATALOADER.CACHE=host"]).dump()
    for feed, cache in {"loader": "none", "cached": "host"}.items():
        old = text.replace("CACHE: host\n", f"CACHE: host\n  FEED: {feed}\n")
        assert cache == parse_config(old).DATALOADER.CACHE


def test_a_test_set_keeps_its_protocol(tmp_path):
    section = "DATASETS: {TESTS: {mine: {NAME: csv_file, PATH: a.csv, PROTOCOL: plain}}}"
    (tmp_path / "a.yaml").write_text(section)
    cfg = load_config(tmp_path / "a.yaml")
    assert cfg.DATASETS.TESTS.mine.PROTOCOL == "plain"
    assert parse_config(cfg.dump()) == cfg


def test_a_plugin_may_use_a_name_of_before(monkeypatch):
    from fastreid_uns.registry import HOOK_REGISTRY

    load_plugins(["fastreid_uns.builtin"])
    monkeypatch.setitem(HOOK_REGISTRY._obj_map, "GuideHook", type("GuideHook", (), {}))
    assert load_config(overrides=["HOOKS.mine.NAME=GuideHook"]).HOOKS.mine.NAME == "GuideHook"
