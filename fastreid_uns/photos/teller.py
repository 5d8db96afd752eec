"""What a person is told while photos are grouped."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


class Teller:
    """Puts what there is to say into the log; a command shows it on its terminal instead."""

    def begin(self, folder: Path) -> None:
        """The output folder is there now."""

    def line(self, text: str) -> None:
        """Say something that stays."""
        logger.info("%s", text)

    def share(self, stage: str, done: float, left: float | None) -> None:
        """Say how far the work is.

        Args:
            stage: what is being done.
            done: share of the whole work, in 0..1.
            left: seconds, None if not known.
        """


def duration(seconds: float) -> str:
    """`48 s`, `3 min 5 s`, `2 h 7 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if seconds >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def plural(number: int, noun: str) -> str:
    """`1 photo`, `2,640 photos`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
