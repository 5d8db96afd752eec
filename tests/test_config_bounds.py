"""Every key of the frame refuses what is out of its bounds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import pytest

from fastreid_uns.bounds import BOUNDS
from fastreid_uns.config import load_config
from fastreid_uns.config.schema import COMPONENTS, FREE, MAPS
from fastreid_uns.data.camera_style import KINDS
from fastreid_uns.defaults import DEFAULTS
from fastreid_uns.engine.solver import PRECISIONS, SCHEDULES

NOT_FINITE = ["nan", "inf", "-inf"]
NO_NAME = ["''", "a\nb", "a\0b"]
OUT_OF_BOUNDS = {
    "PLUGINS": [[""]],
    "SEED": [-1, 2**31],
    "OUTPUT_DIR": NO_NAME,
    "INPUT.SIZE": [[32], [32, 16, 3], [0, 16], [32, -16], [32, 5000]],
    "INPUT.MEAN": [[0.5], [0.5, 0.5, 1.5], [-0.1, 0.5, 0.5], "[.nan, 0.5, 0.5]"],
    "INPUT.STD": [[0.2, 0.2], [0.0, 0.2, 0.2], [0.2, 0.2, 1.5], "[.inf, 0.2, 0.2]"],
    "INPUT.VIEWS": [[], [""]],
    "INPUT.CAMERA_STYLE.KIND": ["hues", "''"],
    "INPUT.CAMERA_STYLE.FOLDER": ["a\nb"],
    "INPUT.ON_BAD_IMAGE": ["go on", "''"],
    "DATALOADER.CACHE": ["tape", "''"],
    "DATALOADER.CACHE_DIR": ["a\0b"],
    "DATALOADER.WORKERS": [-1, 5000],
    "MODEL.DEVICE": ["gpu", "cuda:", "cuda:-1", "''", "CPU"],
    "MODEL.WEIGHTS": ["a\nb"],
    "MODEL.GHOST_BATCH": [-1],
    "SOLVER.OPTIMIZER": NO_NAME,
    "SOLVER.BASE_LR": [-0.1, *NOT_FINITE],
    "SOLVER.WEIGHT_DECAY": [-0.1, *NOT_FINITE],
    "SOLVER.WEIGHT_DECAY_NORM": [-0.1, *NOT_FINITE],
    "SOLVER.EPOCHS": [0, -1],
    "SOLVER.ITERS_PER_EPOCH": [-1],
    "SOLVER.SCHEDULE": ["cosin", "''"],
    "SOLVER.STEP_EPOCHS": [0, -1],
    "SOLVER.MILESTONES": [[-1], [10, -1]],
    "SOLVER.GAMMA": [0, -0.1, 1.1, *NOT_FINITE],
    "SOLVER.MIN_LR": [-0.1, *NOT_FINITE],
    "SOLVER.WARMUP_EPOCHS": [-1],
    "SOLVER.WARMUP_FACTOR": [-0.1, 1.1, *NOT_FINITE],
    "SOLVER.WARMUP_BY": ["steps", "''"],
    "SOLVER.FREEZE": [[""]],
    "SOLVER.AMP": ["fp16", "''"],
    "SOLVER.CLIP_NORM": [-1, *NOT_FINITE],
    "SOLVER.ACCUMULATE": [0, -1],
    "CHECKPOINT.PERIOD": [-1],
    "CHECKPOINT.KEEP": [0, -1],
    "LOG.PERIOD_STEPS": [-1],
    "LOG.WRITERS": [["paper"], ["text", ""], ["json", "json"]],
    "DISTRIBUTED.TIMEOUT_MINUTES": [0, -1, 20_000, *NOT_FINITE],
    "TEST.PERIOD": [-1],
    "TEST.BATCH_SIZE": [0, -1],
    "TEST.RERANK": ["both", ""],
    "TEST.PATIENCE": [-1],
}


def leaves(tree: Mapping, where: str = "") -> Iterator[tuple[str, object]]:
    """Keys that belong to no component, with their defaults."""
    for key, value in tree.items():
        path = f"{where}.{key}".lstrip(".")
        if path == "MODEL" or (isinstance(value, Mapping) and path not in {*COMPONENTS, *MAPS, *FREE}):
            yield from leaves(value, path)
        elif not isinstance(value, Mapping) and path != "MODEL.NAME":
            yield path, value


KEYS = dict(leaves(DEFAULTS))
CASES = [(key, value) for key, values in OUT_OF_BOUNDS.items() for value in values]


def test_every_key_has_bounds_and_every_bound_a_key():
    no_switches = {key for key, value in KEYS.items() if not isinstance(value, bool)}
    assert set(BOUNDS) == no_switches == set(OUT_OF_BOUNDS)


@pytest.mark.parametrize(("key", "value"), CASES, ids=lambda part: repr(part))
def test_a_value_out_of_bounds_is_refused_with_what_is_accepted(key, value):
    text = value if isinstance(value, str) else json.dumps(value)
    with pytest.raises(ValueError, match=rf"command line: {key}(\[0\])? is .* accepted.* Change the value") as refused:
        load_config(overrides=[key, text])
    finite = "finite" in str(refused.value)
    assert finite or BOUNDS[key].accepted in str(refused.value)


def test_the_weight_of_a_loss_is_not_negative():
    with pytest.raises(ValueError, match=r"command line: MODEL.LOSSES.contrast.WEIGHT is -1.0; a number from 0 is"):
        load_config(overrides=["MODEL.LOSSES.contrast.WEIGHT", "-1"])
    assert load_config(overrides=["MODEL.LOSSES.contrast.WEIGHT", "0"]).MODEL.LOSSES.contrast.WEIGHT == 0


@pytest.mark.parametrize("key", [key for key, value in KEYS.items() if isinstance(value, bool)])
def test_a_switch_is_true_or_false(key):
    for text in ("2", "''", "maybe"):
        with pytest.raises(ValueError, match=rf"{key} is .*; true or false such as"):
            load_config(overrides=[key, text])


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.CLIP_NORM", "0", 0.0),
        ("SOLVER.GAMMA", "1", 1.0),
        ("SOLVER.MILESTONES", "[]", []),
        ("INPUT.SIZE", "[1, 4096]", [1, 4096]),
        ("MODEL.DEVICE", "cuda:1", "cuda:1"),
        ("DATALOADER.WORKERS", "0", 0),
        ("SEED", "0", 0),
        ("SOLVER.ITERS_PER_EPOCH", "0", 0),
    ],
)
def test_the_edges_are_accepted(key, text, value):
    section, _, name = key.rpartition(".")
    cfg = load_config(overrides=[key, text])
    assert (cfg[section][name] if section else cfg[name]) == value


def test_the_words_are_those_that_the_parts_know():
    assert BOUNDS["SOLVER.SCHEDULE"].names == SCHEDULES
    assert set(BOUNDS["SOLVER.AMP"].names) == {"auto", *PRECISIONS}
    assert set(BOUNDS["INPUT.CAMERA_STYLE.KIND"].names) == set(KINDS)


def test_a_near_word_is_named():
    with pytest.raises(ValueError, match=r"SCHEDULE is 'cosin'; one of step, .* is accepted; did you mean cosine\?"):
        load_config(overrides=["SOLVER.SCHEDULE", "cosin"])


@pytest.mark.parametrize("rates", [["SOLVER.BASE_LR=0"], ["SOLVER.BASE_LR=0.1", "SOLVER.MIN_LR=0.2"]])
def test_a_cosine_falls_from_the_first_rate_to_the_last(rates):
    with pytest.raises(ValueError, match=r"SOLVER\.MIN_LR is .* and SOLVER\.BASE_LR is .*cosine"):
        load_config(overrides=["SOLVER.SCHEDULE=cosine", *rates])


def test_a_rise_by_steps_needs_their_number():
    keys = ["SOLVER.ITERS_PER_EPOCH=0", "SOLVER.WARMUP_EPOCHS=2"]
    with pytest.raises(ValueError, match=r"ITERS_PER_EPOCH is 0, .*WARMUP_EPOCHS 2\. Set WARMUP_BY to epoch"):
        load_config(overrides=keys)
    assert load_config(overrides=[*keys, "SOLVER.WARMUP_BY=epoch"]).SOLVER.WARMUP_EPOCHS == 2


@pytest.mark.parametrize("value", [-0.1, 1.5, 7, "nan"])
def test_the_momentum_of_an_encoder_is_a_fraction(value):
    from fastreid_uns.modeling.meta_arch import build_model

    keys = ["MODEL.BACKBONE.NAME=SmallNet", "MODEL.MOMENTUM_ENCODER=true", f"MODEL.ENCODER_MOMENTUM={value}"]
    with pytest.raises(ValueError, match=r"ENCODER_MOMENTUM is .* accepted"):
        build_model(load_config(overrides=keys), 4)
