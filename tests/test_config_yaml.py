"""What a config file may hold, and how each other content is answered."""

from __future__ import annotations

import itertools
import time

import pytest

from fastreid_uns.config import load_config, parse_config
from fastreid_uns.config.yaml_text import MOST_VALUES, parse_yaml
from fastreid_uns.errors import UserError


def bomb(form: str) -> str:
    """Twelve lines, each of which uses the one before ten times."""
    names = "abcdefghijklm"
    lines = ["a: &a {x: 1}"]
    lines += [f"{new}: &{new} " + form.replace("_", f"*{old}") for old, new in itertools.pairwise(names)]
    return "\n".join(lines)


CASES = {
    "SEED: 1\nOUTPUT_DIR: a\nSEED: 2": r"the key SEED is given twice, in line 1 and in line 3",
    "SOLVER:\n  EPOCHS: 1\n  GAMMA: 1\n  EPOCHS: 2": "the key EPOCHS is given twice, in line 2 and in line 4",
    "SOLVER: {EPOCHS: 1}\nSEED: 1\nSOLVER: {GAMMA: 1}": "the key SOLVER is given twice, in line 1 and in line 3",
    "SOLVER:": r"SOLVER is null; a map of keys is accepted\. Leave it out to keep its values",
    "SOLVER: [1]": "SOLVER is a list; a map of keys is accepted",
    "DATASETS: {TRAIN: 5}": "DATASETS.TRAIN is 5; a map of keys is accepted",
    "MODEL:": "MODEL is null; a map of keys is accepted",
    "MODEL: {BACKBONE: null}": "MODEL.BACKBONE is null; a map of keys is accepted",
    "MODEL: {LOSSES: [a]}": "MODEL.LOSSES is a list; a map of keys is accepted",
    "MODEL: {LOSSES: {5: {NAME: SoftTripletLoss}}}": "the name of an entry is 5, a whole number; text is accepted",
    "HOOKS: {a: {NAME: 5}}": "HOOKS.a.NAME is 5, a whole number; text is accepted. Write it in quotes",
    "_BASE_: 5": r"_BASE_ is 5; a file such as \.\./base\.yaml is accepted, or a list of files",
    "_BASE_:": "_BASE_ is null; a file",
    "_BASE_: [a.yaml, 5]": "_BASE_ is .*; a file",
    "_BASE_: ''": "_BASE_ is ''; a file",
    "_BASE_: .": "is no file, named as _BASE_ by",
    "PLUGINS: ./mine": r"PLUGINS is './mine', text; a list such as \['name'\] is accepted",
    "PLUGINS: [5]": r"PLUGINS\[0\] is 5",
    "PLUGINS: [no_such]": "a.yaml: PLUGINS: 'no_such' is no module",
    "PLUGINS: [./gone]": "a.yaml: PLUGINS: the folder .*gone does not exist. Name the place to which it was moved",
    "solver: {epochs: 1}": r"unknown key solver; did you mean SOLVER\?",
    "a: &a [*a]": "an alias in line 1 contains itself",
    bomb("[_,_,_,_,_,_,_,_,_,_]"): f"its aliases stand for more than {MOST_VALUES:,} values",
    bomb("{<<: [_,_,_,_,_,_,_,_,_,_]}"): f"its aliases stand for more than {MOST_VALUES:,} values",
    "[" * 3000: "nested too deeply",
    "- " * 3000 + "x": "nested too deeply",
    "#" * 300_000: "has more than 262,144 bytes",
    "SEED: !!python/object/apply:os.system [exit]": "no valid YAML: could not determine a constructor",
    "SEED: !!timestamp x": "no valid YAML",
    "SEED: !!bool x": "no valid YAML",
    "SEED: " + "9" * 5000: "no valid YAML",
    "SEED: " + "9" * 4000: r"SEED is 9{60} \.\.\. 9{20}; a number from 0",
    "SEED: \0": "no valid YAML: unacceptable character",
    "\tSEED: 1": "no valid YAML: .*line 1, column 1",
    "SEED: 1\n---\nSEED: 2": "no valid YAML: expected a single document",
    "? [a]\n: b": "no valid YAML: .*unhashable key",
    "- a": "found a list; a config is a map",
    "just text": "found text; a config is a map",
    "5": "found a whole number; a config is a map",
}


@pytest.mark.parametrize("overrides", [[], ["SOLVER.BASE_LR", "0.1"]], ids=["alone", "with an override"])
@pytest.mark.parametrize("text", CASES, ids=lambda text: repr(text[:40]))
def test_what_is_no_config_is_refused_at_once_and_by_name(text, overrides, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    began = time.process_time()
    with pytest.raises(UserError, match=CASES[text]) as refused:
        load_config(tmp_path / "a.yaml", overrides)
    assert "a.yaml" in str(refused.value)
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    "content", ["OUTPUT_DIR: größe".encode("latin1"), "SEED: 1".encode("utf-16"), b"\x89PNG\r\n\x1a\n"], ids=repr
)
def test_another_encoding_is_named(content, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.yaml: byte \d+ is no UTF-8.*Save the file in that encoding"):
        load_config(tmp_path / "a.yaml")


def test_a_byte_order_mark_and_an_empty_file_are_fine(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfSEED: 5")
    assert load_config(tmp_path / "a.yaml").SEED == 5
    (tmp_path / "a.yaml").write_bytes(b"")
    assert load_config(tmp_path / "a.yaml") == load_config()


def test_a_file_that_nobody_may_read(tmp_path, monkeypatch):
    from pathlib import Path

    def refuse(*_args: object, **_keys: object):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.yaml").write_text("SEED: 1")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.yaml: the file cannot be read \(Permission denied\)"):
        load_config(tmp_path / "a.yaml")


def test_aliases_that_stay_small_are_fine(tmp_path):
    text = (
        "DATASETS:\n  TRAIN: &set {NAME: synthetic, DIFFICULTY: 0.4}\n  TESTS: {same: *set, other: {<<: *set, SEED: 2}}"
    )
    (tmp_path / "a.yaml").write_text(text)
    sets = load_config(tmp_path / "a.yaml").DATASETS
    assert sets.TESTS.same == sets.TRAIN
    assert (sets.TESTS.other.DIFFICULTY, sets.TESTS.other.SEED) == (0.4, 2)


def test_bases_that_multiply_end(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.yaml").write_text(f"_BASE_: [{i + 1}.yaml, {i + 1}.yaml]")
    (tmp_path / "12.yaml").write_text("SEED: 1")
    with pytest.raises(ValueError, match="_BASE_ leads to more than 100 files"):
        load_config(tmp_path / "0.yaml")


def test_a_circle_of_bases_by_another_spelling(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "a.yaml").write_text("_BASE_: x/../a.yaml")
    with pytest.raises(ValueError, match=r"_BASE_ runs in a circle: a\.yaml -> a\.yaml"):
        load_config(tmp_path / "a.yaml")


@pytest.mark.parametrize("text", ["", "- a", "SEED: 1\nSEED: 2", "a: &a [*a]", "SEED: \x01"])
def test_the_text_of_a_checkpoint_is_read_as_strictly(text):
    with pytest.raises(ValueError, match=r"x\.pth: "):
        parse_config(text, "x.pth")


def test_the_base_of_a_section_is_kept_when_one_key_changes(tmp_path):
    (tmp_path / "p.yaml").write_text("SOLVER: {BASE_LR: 0.001, EPOCHS: 7}")
    (tmp_path / "c.yaml").write_text("_BASE_: p.yaml\nSOLVER: {}")
    solver = load_config(tmp_path / "c.yaml", ["SOLVER.GAMMA", "0.5"]).SOLVER
    assert (solver.BASE_LR, solver.EPOCHS, solver.GAMMA) == (0.001, 7, 0.5)


def test_numbers_and_words_of_yaml():
    read = {"010": "010", "1:30": "1:30", "2024-11-26": "2024-11-26", "0": 0, "-7": -7, "1_000": 1000, "yes": True}
    for text, value in read.items():
        assert parse_yaml(text, "x") == value
    assert parse_yaml("[010, no, ~, 'a b']", "x", scalars_as_text=True) == ["010", "no", "~", "a b"]
    assert parse_yaml("", "x") is None
