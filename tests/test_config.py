from pathlib import Path

import pytest
import yaml

from fastreid_uns.config import deviations, load_config, parse_config
from fastreid_uns.defaults import DEFAULTS
from fastreid_uns.registry import META_ARCH_REGISTRY


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.write_text(text)
    return file


def test_sections_are_completed_from_signatures(tmp_path):
    cfg = load_config(write(tmp_path, "a.yaml", "PSEUDO_LABELS: {EPS: 0.7}"))
    assert cfg.PSEUDO_LABELS.NAME == "DBSCANLabels"
    assert cfg.PSEUDO_LABELS.EPS == 0.7
    assert cfg.PSEUDO_LABELS.K1 == 30
    assert cfg.MODEL.LOSSES.contrast.WEIGHT == 1.0
    assert cfg.INPUT.AUGMENTS.train.FLIP == 0.5


def test_dump_loads_again_as_the_same_config(tmp_path):
    cfg = load_config(write(tmp_path, "a.yaml", "MODEL: {LOSSES: {triplet: {NAME: SoftTripletLoss, WEIGHT: 0.5}}}"))
    assert load_config(write(tmp_path, "dump.yaml", cfg.dump())) == cfg
    assert parse_config(cfg.dump()) == cfg


@pytest.mark.parametrize("value", ["[64, a]", "[64.5, 32]"])
def test_sizes_are_whole_numbers_although_the_default_is_empty(value):
    with pytest.raises(ValueError, match=r"INPUT.SIZE\[.\] is .*; a whole number such as"):
        load_config(overrides=[f"INPUT.SIZE={value}"])


def test_chain_of_bases_later_files_win_and_the_command_line_wins_over_all(tmp_path):
    write(tmp_path, "one.yaml", "SEED: 2\nSOLVER: {EPOCHS: 7, BASE_LR: 0.1}")
    write(tmp_path, "two.yaml", "SOLVER: {EPOCHS: 8}")
    child = write(tmp_path, "child.yaml", "_BASE_: [one.yaml, two.yaml]\nSOLVER: {BASE_LR: 0.2}")
    cfg = load_config(child, ["SOLVER.BASE_LR", "3e-4", "SOLVER.GAMMA=0.5"])
    assert (cfg.SEED, cfg.SOLVER.EPOCHS, cfg.SOLVER.BASE_LR, cfg.SOLVER.GAMMA) == (2, 8, 3e-4, 0.5)


def test_a_new_name_replaces_the_section_in_whatever_order_the_keys_come(tmp_path):
    parent = write(tmp_path, "p.yaml", "PSEUDO_LABELS: {NAME: DBSCANLabels, EPS: 0.7}")
    write(tmp_path, "c.yaml", "_BASE_: p.yaml\nPSEUDO_LABELS: {NAME: KMeansLabels}")
    assert "EPS" not in load_config(tmp_path / "c.yaml").PSEUDO_LABELS
    cfg = load_config(parent, ["PSEUDO_LABELS.NUM_CLUSTERS", "9", "PSEUDO_LABELS.NAME", "KMeansLabels"])
    assert cfg.PSEUDO_LABELS.NUM_CLUSTERS == 9


def test_entries_of_a_map_are_added_changed_and_dropped(tmp_path):
    write(tmp_path, "p.yaml", "MODEL: {LOSSES: {triplet: {NAME: SoftTripletLoss, WEIGHT: 0.5}}}")
    child = write(tmp_path, "c.yaml", "_BASE_: p.yaml\nMODEL: {LOSSES: {contrast: null}}")
    cfg = load_config(child, ["MODEL.LOSSES.triplet.WEIGHT", "2"])
    assert list(cfg.MODEL.LOSSES) == ["triplet"]
    assert cfg.MODEL.LOSSES.triplet.WEIGHT == 2.0


def test_a_component_is_switched_off_with_null():
    assert load_config(overrides=["MODEL.MEMORY", "null"]).MODEL.MEMORY.NAME == ""


def test_unknown_key_names_file_key_and_the_near_one(tmp_path):
    with pytest.raises(KeyError, match=r"msmt\.yaml: unknown key MODEL\.MEMORY\.MOMENTM; did you mean MOMENTUM\?"):
        load_config(write(tmp_path, "msmt.yaml", "MODEL: {MEMORY: {MOMENTM: 0.1}}"))
    with pytest.raises(KeyError, match=r"command line: unknown key SOLVER\.EPOCH; did you mean EPOCHS\?"):
        load_config(overrides=["SOLVER.EPOCH", "3"])


def test_unknown_component_names_file_and_the_near_one(tmp_path):
    with pytest.raises(KeyError, match=r"a\.yaml: PSEUDO_LABELS\.NAME.*did you mean DBSCANLabels\?"):
        load_config(write(tmp_path, "a.yaml", "PSEUDO_LABELS: {NAME: DBSCANLabel}"))


def test_an_int_is_taken_for_a_float_and_nothing_else_is_converted():
    assert load_config(overrides=["SOLVER.BASE_LR", "1"]).SOLVER.BASE_LR == 1.0
    for wrong in (["SOLVER.EPOCHS", "1.5"], ["SOLVER.EPOCHS", "true"], ["SEED", "many"], ["SOLVER.COMPILE", "1"]):
        with pytest.raises(ValueError, match=rf"command line: {wrong[0]} is .*accepted"):
            load_config(overrides=wrong)


def test_override_without_a_value():
    with pytest.raises(ValueError, match=r"command line: key 'SEED' has no value"):
        load_config(overrides=["SEED"])


def test_missing_base_is_named_with_the_file_that_asks_for_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml does not exist, named as _BASE_ by .*a\.yaml"):
        load_config(write(tmp_path, "a.yaml", "_BASE_: gone.yaml"))


def test_a_circle_of_bases(tmp_path):
    write(tmp_path, "a.yaml", "_BASE_: b.yaml")
    with pytest.raises(ValueError, match=r"_BASE_ runs in a circle: b\.yaml -> a\.yaml -> b\.yaml"):
        load_config(write(tmp_path, "b.yaml", "_BASE_: a.yaml"))


def test_a_file_that_is_no_map(tmp_path):
    with pytest.raises(ValueError, match=r"a\.yaml: found a list"):
        load_config(write(tmp_path, "a.yaml", "[1, 2]"))


def test_a_map_entry_needs_a_name():
    with pytest.raises(KeyError, match=r"MODEL\.LOSSES\.extra has no NAME"):
        load_config(overrides=["MODEL.LOSSES.extra.WEIGHT", "1.0"])


def test_config_is_frozen_and_names_the_near_key():
    cfg = load_config()
    with pytest.raises(AttributeError, match=r"SEED.*immutable"):
        cfg.SEED = 3
    with pytest.raises(AttributeError, match="no key EPOCH; did you mean EPOCHS"):
        _ = cfg.SOLVER.EPOCH


def test_framework_keys_of_the_model_section_are_the_reserved_ones():
    assert set(DEFAULTS["MODEL"]) - {"NAME"} == META_ARCH_REGISTRY.reserved


def test_defaults_are_plain_yaml():
    assert yaml.safe_load(yaml.safe_dump(DEFAULTS)) == DEFAULTS


def test_departures_from_the_paper_are_named(tmp_path):
    text = "PAPER: {SOLVER: {EPOCHS: 60, BASE_LR: 0.0005}, PSEUDO_LABELS: {EPS: 0.5}}\n"
    write(tmp_path, "p.yaml", text + "SOLVER: {EPOCHS: 60, BASE_LR: 0.0005}\nPSEUDO_LABELS: {EPS: 0.5}")
    assert deviations(load_config(tmp_path / "p.yaml")) == []
    cfg = load_config(tmp_path / "p.yaml", ["SOLVER.EPOCHS", "5", "PSEUDO_LABELS.NAME", "KMeansLabels"])
    assert deviations(cfg) == ["SOLVER.EPOCHS: 5 instead of 60", "PSEUDO_LABELS.EPS: None instead of 0.5"]
