"""What values the keys of `defaults.DEFAULTS` accept, beyond their type."""

from __future__ import annotations

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
    "DATALOADER.WORKERS": at_least(0, 1024),
    "MODEL.DEVICE": matching(r"auto|cpu|cuda(:[0-9]+)?|mps", "auto, cpu, cuda, cuda:0, cuda:1, ... or mps"),
    "MODEL.WEIGHTS": PATH,
    "MODEL.GHOST_BATCH": at_least(0),
    "SOLVER.OPTIMIZER": NAME,
    "SOLVER.BASE_LR": at_least(0),
    "SOLVER.WEIGHT_DECAY": at_least(0),
    "SOLVER.WEIGHT_DECAY_NORM": at_least(0),
    "SOLVER.EPOCHS": at_least(1),
    "SOLVER.ITERS_PER_EPOCH": at_least(0),
    "SOLVER.SCHEDULE": one_of("step", "milestones", "cosine", "constant"),
    "SOLVER.STEP_EPOCHS": at_least(1),
    "SOLVER.MILESTONES": or_empty(each(at_least(0))),
    "SOLVER.GAMMA": above(0, 1),
    "SOLVER.MIN_LR": at_least(0),
    "SOLVER.WARMUP_EPOCHS": at_least(0),
    "SOLVER.WARMUP_FACTOR": at_least(0, 1),
    "SOLVER.WARMUP_BY": one_of("step", "epoch"),
    "SOLVER.FREEZE": or_empty(each(NAME)),
    "SOLVER.AMP": one_of("auto", "bfloat16", "float16", "none"),
    "SOLVER.CLIP_NORM": at_least(0),
    "SOLVER.ACCUMULATE": at_least(1),
    "CHECKPOINT.PERIOD": at_least(0),
    "CHECKPOINT.KEEP": at_least(1),
    "LOG.PERIOD_STEPS": at_least(0),
    "LOG.WRITERS": or_empty(different(each(one_of("text", "json", "tensorboard", "wandb")))),
    "DISTRIBUTED.TIMEOUT_MINUTES": above(0, 10_080),
    "TEST.PERIOD": at_least(0),
    "TEST.BATCH_SIZE": at_least(1),
    "TEST.RERANK": one_of("none", "jaccard", "camera_jaccard"),
    "TEST.PATIENCE": at_least(0),
}


OF_COMPONENTS = {"WEIGHT": at_least(0)}  # of keys that all components of a kind have


def check_bound(key: str, value: Any, where: str) -> None:
    """Refuse a value of a key that is out of its bounds; keys without bounds accept all values of their type.

    Args:
        key: with dots; that of all components of a kind, such as WEIGHT, by itself.
        where: file and key, as the message begins.

    Raises:
        ValueError: the value is out of bounds.
    """
    bound = BOUNDS.get(key) or OF_COMPONENTS.get(key)
    if bound and not bound.accepts(value):
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
