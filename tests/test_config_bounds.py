"""Every key of the frame refuses what is out of its bounds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import pytest

import fastreid_uns.builtin  # noqa: F401  (fills the registries)
from fastreid_uns import registry
from fastreid_uns.bounds import BOUNDS, LARGEST
from fastreid_uns.config import load_config
from fastreid_uns.config.schema import COMPONENTS, FREE, MAPS
from fastreid_uns.data.camera_style import KINDS
from fastreid_uns.defaults import DEFAULTS
from fastreid_uns.engine.solver import PRECISIONS, SCHEDULES

HUGE = 10**9
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
    "DATALOADER.WORKERS": [-1, 5000, HUGE],
    "MODEL.DEVICE": ["gpu", "cuda:", "cuda:-1", "''", "CPU"],
    "MODEL.WEIGHTS": ["a\nb"],
    "MODEL.GHOST_BATCH": [-1, HUGE],
    "SOLVER.OPTIMIZER": NO_NAME,
    "SOLVER.BASE_LR": [-0.1, *NOT_FINITE],
    "SOLVER.WEIGHT_DECAY": [-0.1, *NOT_FINITE],
    "SOLVER.WEIGHT_DECAY_NORM": [-0.1, *NOT_FINITE],
    "SOLVER.EPOCHS": [0, -1, HUGE],
    "SOLVER.ITERS_PER_EPOCH": [-1, HUGE],
    "SOLVER.SCHEDULE": ["cosin", "''"],
    "SOLVER.STEP_EPOCHS": [0, -1, HUGE],
    "SOLVER.MILESTONES": [[-1], [10, -1], [HUGE]],
    "SOLVER.GAMMA": [0, -0.1, 1.1, *NOT_FINITE],
    "SOLVER.MIN_LR": [-0.1, *NOT_FINITE],
    "SOLVER.WARMUP_EPOCHS": [-1, HUGE],
    "SOLVER.WARMUP_FACTOR": [-0.1, 1.1, *NOT_FINITE],
    "SOLVER.WARMUP_BY": ["steps", "''"],
    "SOLVER.FREEZE": [[""]],
    "SOLVER.AMP": ["fp16", "''"],
    "SOLVER.CLIP_NORM": [-1, *NOT_FINITE],
    "SOLVER.ACCUMULATE": [0, -1, HUGE],
    "CHECKPOINT.PERIOD": [-1, HUGE],
    "CHECKPOINT.KEEP": [0, -1, HUGE],
    "LOG.PERIOD_STEPS": [-1, HUGE],
    "LOG.WRITERS": [["paper"], ["text", ""], ["json", "json"]],
    "DISTRIBUTED.TIMEOUT_MINUTES": [0, -1, 20_000, *NOT_FINITE],
    "TEST.PERIOD": [-1, HUGE],
    "TEST.BATCH_SIZE": [0, -1, HUGE],
    "TEST.RERANK": ["both", ""],
    "TEST.PATIENCE": [-1, HUGE],
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


COMPONENTS_OF = {  # registry → a place where each of its components may be named
    registry.AUGMENT_REGISTRY: "INPUT.AUGMENTS.train",
    registry.BACKBONE_REGISTRY: "MODEL.BACKBONE",
    registry.DATASET_REGISTRY: "DATASETS.TESTS.a",
    registry.HEAD_REGISTRY: "MODEL.HEAD",
    registry.HOOK_REGISTRY: "HOOKS.a",
    registry.LOSS_REGISTRY: "MODEL.LOSSES.a",
    registry.MEMORY_REGISTRY: "MODEL.MEMORY",
    registry.META_ARCH_REGISTRY: "MODEL",
    registry.PSEUDO_LABEL_REGISTRY: "PSEUDO_LABELS",
    registry.SAMPLER_REGISTRY: "DATALOADER.SAMPLER",
}
WHOLE_NUMBERS = [
    (place, name, key.upper(), HUGE if isinstance(default, int) else [HUGE])
    for kind, place in COMPONENTS_OF.items()
    for name, _ in kind
    for key, default in kind.schema(name).items()
    if kind.types(name)[key] in ("int", "Sequence[int]") and key != "seed"
]


@pytest.mark.parametrize(("place", "name", "key", "value"), WHOLE_NUMBERS, ids=lambda part: str(part))
def test_a_whole_number_that_no_memory_holds_is_refused_in_every_component(place, name, key, value):
    needed = ["DATASETS.TESTS.a.PATH=a.csv"] if name == "csv_file" else []
    with pytest.raises(ValueError, match=rf"{key} is \[?1000000000\]?; a whole number up to [\d,]+ is accepted"):
        load_config(overrides=[f"{place}.NAME={name}", f"{place}.{key}={json.dumps(value)}", *needed])


def test_every_registry_and_every_limit_has_a_key():
    assert {kind for kind in vars(registry).values() if isinstance(kind, registry.Registry)} == set(COMPONENTS_OF)
    keys = {key.upper() for kind in COMPONENTS_OF for name, _ in kind for key in kind.schema(name)}
    assert set(LARGEST) <= keys


def test_an_epoch_is_small_enough_to_be_planned():
    keys = ["SOLVER.ITERS_PER_EPOCH=1000000", "DATALOADER.SAMPLER.NUM_INSTANCES=1"]
    with pytest.raises(ValueError, match=r"ITERS_PER_EPOCH is 1,000,000 and .*BATCH_SIZE is 101; .*100,000,000 images"):
        load_config(overrides=[*keys, "DATALOADER.SAMPLER.BATCH_SIZE=101"])
    assert load_config(overrides=[*keys, "DATALOADER.SAMPLER.BATCH_SIZE=100"]).DATALOADER.SAMPLER.BATCH_SIZE == 100


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
