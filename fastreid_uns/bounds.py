"""What values the keys of `defaults.DEFAULTS` accept, beyond their type."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastreid_uns.errors import InvalidValue, shown
from fastreid_uns.registry import did_you_mean


@dataclass(frozen=True)
class Bound:
    """A condition on a value that has the right type already.

    Args:
        accepted: what is accepted, as messages say it.
        accepts: the condition.
        names: the accepted words, if there are only a few.
    """

    accepted: str
    accepts: Callable[[Any], bool]
    names: tuple[str, ...] = ()


def at_least(low: float, high: float = float("inf")) -> Bound:
    """Numbers from `low` to `high`, both included."""
    words = f"a number from {low:,}" + (f" to {high:,}" if high != float("inf") else "")
    return Bound(words, lambda value: low <= value <= high)


def above(low: float, high: float) -> Bound:
    """Numbers from `low` to `high`, without `low`."""
    return Bound(f"a number above {low:,} and up to {high:,}", lambda value: low < value <= high)


def one_of(*names: str) -> Bound:
    """A few words."""
    return Bound(f"one of {', '.join(names)}", lambda value: value in names, names)


def matching(form: str, words: str) -> Bound:
    """Text of a form."""
    return Bound(words, lambda value: re.fullmatch(form, value) is not None)


def each(bound: Bound, length: int | None = None) -> Bound:
    """A list of which every value keeps to a bound; of a length, or of any length above 0."""
    if length is None:
        return Bound(f"a list with {bound.accepted} at least once", lambda v: bool(v) and all(map(bound.accepts, v)))
    words = f"a list of {length}, each {bound.accepted}"
    return Bound(words, lambda value: len(value) == length and all(map(bound.accepts, value)))


def or_empty(bound: Bound) -> Bound:
    """A list as `bound` accepts it, or an empty one."""
    return Bound(f"{bound.accepted}, or an empty list", lambda value: not value or bound.accepts(value))


def different(bound: Bound) -> Bound:
    """A list as `bound` accepts it, in which no value is there twice."""
    return Bound(
        f"{bound.accepted} and never twice", lambda value: bound.accepts(value) and len(set(value)) == len(value)
    )


PATH = matching(r"[^\x00-\x1f]*", "a path or nothing, without control characters")
NAME = matching(r"[^\x00-\x1f]+", "text of at least one character, without control characters")

MOST = 1_000_000  # of whole numbers: no run that comes to an end needs more
MOST_OF_A_STEP = 65_536  # images
MOST_PLANNED = 100_000_000  # images of one epoch, whose plan is held with eight bytes for each

BOUNDS: dict[str, Bound] = {
    "PLUGINS": or_empty(each(NAME)),
    "SEED": at_least(0, 2**31 - 1),
    "OUTPUT_DIR": NAME,
    "INPUT.SIZE": or_empty(each(at_least(1, 4096), 2)),
    "INPUT.MEAN": or_empty(each(at_least(0, 1), 3)),
    "INPUT.STD": or_empty(each(above(0, 1), 3)),
    "INPUT.VIEWS": each(NAME),
    "INPUT.CAMERA_STYLE.KIND": one_of("colors", "images"),
    "INPUT.CAMERA_STYLE.FOLDER": PATH,
    "INPUT.ON_BAD_IMAGE": one_of("stop", "skip"),
    "DATALOADER.CACHE": one_of("none", "device", "host", "disk"),
    "DATALOADER.CACHE_DIR": PATH,
    "DATALOADER.WORKERS": at_least(0, 256),
    "MODEL.DEVICE": matching(r"auto|cpu|cuda(:[0-9]+)?|mps", "auto, cpu, cuda, cuda:0, cuda:1, ... or mps"),
    "MODEL.WEIGHTS": PATH,
    "MODEL.GHOST_BATCH": at_least(0, MOST_OF_A_STEP),
    "SOLVER.OPTIMIZER": NAME,
    "SOLVER.BASE_LR": at_least(0),
    "SOLVER.WEIGHT_DECAY": at_least(0),
    "SOLVER.WEIGHT_DECAY_NORM": at_least(0),
    "SOLVER.EPOCHS": at_least(1, MOST),
    "SOLVER.ITERS_PER_EPOCH": at_least(0, MOST),
    "SOLVER.SCHEDULE": one_of("step", "milestones", "cosine", "constant"),
    "SOLVER.STEP_EPOCHS": at_least(1, MOST),
    "SOLVER.MILESTONES": or_empty(each(at_least(0, MOST))),
    "SOLVER.GAMMA": above(0, 1),
    "SOLVER.MIN_LR": at_least(0),
    "SOLVER.WARMUP_EPOCHS": at_least(0, MOST),
    "SOLVER.WARMUP_FACTOR": at_least(0, 1),
    "SOLVER.WARMUP_BY": one_of("step", "epoch"),
    "SOLVER.FREEZE": or_empty(each(NAME)),
    "SOLVER.AMP": one_of("auto", "bfloat16", "float16", "none"),
    "SOLVER.CLIP_NORM": at_least(0),
    "SOLVER.ACCUMULATE": at_least(1, MOST_OF_A_STEP),
    "CHECKPOINT.PERIOD": at_least(0, MOST),
    "CHECKPOINT.KEEP": at_least(1, MOST),
    "LOG.PERIOD_STEPS": at_least(0, MOST),
    "LOG.WRITERS": or_empty(different(each(one_of("text", "json", "tensorboard", "wandb")))),
    "DISTRIBUTED.TIMEOUT_MINUTES": above(0, 10_080),
    "TEST.PERIOD": at_least(0, MOST),
    "TEST.BATCH_SIZE": at_least(1, MOST_OF_A_STEP),
    "TEST.RERANK": one_of("none", "jaccard", "camera_jaccard"),
    "TEST.PATIENCE": at_least(0, MOST),
}


LEAST_OF_COMPONENTS = {"WEIGHT": 0}  # of keys that several components have; of the others each says it itself

# the largest whole numbers of components; those of other keys are `MOST`
LARGEST = {
    "SEED": 2**31 - 1,
    "BATCH_SIZE": MOST_OF_A_STEP,
    "NUM_INSTANCES": 4_096,
    "NEGATIVES": MOST_OF_A_STEP,
    "DIM": 65_536,
    "WIDTH": 16_384,
    "DEPTH": 1_024,
    "HEADS": 1_024,
    "PARTS": 1_024,
    "PART_TOKENS": 1_024,
    "PATCH": 4_096,  # pixels, as the sides of INPUT.SIZE
    "STRIDE": 4_096,
    "PAD": 4_096,
    "PRETRAINED_GRID": 4_096,
    "SIZE": 16_384,  # pixels of generated images, or vehicles of a test set
    "PROCESSES": 256,
}


def bound_of(key: str) -> Bound:
    """What a key accepts beyond its type; whole numbers of components must end somewhere, so that memory does not.

    Args:
        key: with dots.
    """
    if key in BOUNDS:
        return BOUNDS[key]
    name = key.rpartition(".")[2]
    least, most = LEAST_OF_COMPONENTS.get(name, -math.inf), LARGEST.get(name, MOST)
    words = f"a number from {least:,}" if name in LEAST_OF_COMPONENTS else f"a whole number up to {most:,}"
    return Bound(words, lambda value: all(_between(least, part, most) for part in _parts(value)))


def _parts(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _between(least: float, value: Any, most: float) -> bool:
    if isinstance(value, int):
        return least <= value <= most
    return not isinstance(value, float) or least <= value


def check_bound(key: str, value: Any, where: str) -> None:
    """Refuse a value of a key that is out of its bounds.

    Args:
        key: with dots.
        where: file and key, as the message begins.

    Raises:
        ValueError: the value is out of bounds.
    """
    bound = bound_of(key)
    if not bound.accepts(value):
        near = did_you_mean(value, bound.names) if isinstance(value, str) else "."
        raise InvalidValue(f"{where} is {shown(value)}; {bound.accepted} is accepted{near} Change the value.")


def check_relations(cfg: Mapping[str, Any]) -> None:
    """Refuse values that are right each by itself and wrong together.

    Raises:
        ValueError: the two keys and their values.
    """
    solver = cfg["SOLVER"]
    if solver["SCHEDULE"] == "cosine" and not 0 < solver["BASE_LR"] >= solver["MIN_LR"]:
        raise InvalidValue(
            f"SOLVER.MIN_LR is {solver['MIN_LR']} and SOLVER.BASE_LR is {solver['BASE_LR']}; with SCHEDULE cosine the "
            f"rate falls from BASE_LR, which must be above 0, to MIN_LR. Change one of them."
        )
    if not solver["ITERS_PER_EPOCH"] and solver["WARMUP_EPOCHS"] and solver["WARMUP_BY"] == "step":
        raise InvalidValue(
            f"SOLVER.ITERS_PER_EPOCH is 0, so the length of an epoch is known after its clustering, and WARMUP_BY is "
            f"step over WARMUP_EPOCHS {solver['WARMUP_EPOCHS']}. Set WARMUP_BY to epoch, or the number of steps."
        )
    batch = cfg["DATALOADER"]["SAMPLER"].get("BATCH_SIZE", 0)
    if solver["ITERS_PER_EPOCH"] * batch > MOST_PLANNED:
        raise InvalidValue(
            f"SOLVER.ITERS_PER_EPOCH is {solver['ITERS_PER_EPOCH']:,} and DATALOADER.SAMPLER.BATCH_SIZE is {batch:,}; "
            f"an epoch is planned as a whole, and up to {MOST_PLANNED:,} images are accepted. Take more epochs of "
            f"fewer steps."
        )
