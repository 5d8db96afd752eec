"""Which of several ways is the fastest on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable


def least_seconds(*actions: Callable[[], object], rounds: int) -> list[float]:
    """The shortest time of each action; they take turns, so that other work on the machine slows all of them."""
    turns = [[_seconds(action) for action in actions] for _ in range(rounds)]
    return [min(times) for times in zip(*turns, strict=True)]


def _seconds(action: Callable[[], object]) -> float:
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin
