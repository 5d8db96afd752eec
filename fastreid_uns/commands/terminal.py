"""What the commands of the photo road say on a terminal, and as plain lines elsewhere."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from pathlib import Path

from fastreid_uns.photos.teller import Teller, duration

logger = logging.getLogger(__name__)

PAUSE = 30.0  # seconds between two lines of progress where there is no terminal
BLINK = 0.2  # seconds between two changes of the line on a terminal


class Terminal(Teller):
    """Facts on stdout; progress on stderr, in one line that changes, or as a line now and then."""

    def __init__(self) -> None:
        self.moving = sys.stderr.isatty()
        self._shown = False
        self._stage, self._last = "", 0.0
        self._unlogged: list[str] | None = []  # until there is a log

    def begin(self, folder: Path) -> None:
        """Everything goes into log.txt, warnings to the terminal as well."""
        from fastreid_uns.engine.log import setup_logging

        setup_logging(folder, console=logging.WARNING)
        earlier, self._unlogged = self._unlogged or [], None
        for text in earlier:
            logger.debug("%s", text)

    def line(self, text: str) -> None:
        """A fact on stdout, and in the log once there is one."""
        self.clear()
        if self._unlogged is None:
            logger.debug("%s", text)
        else:
            self._unlogged.append(text)
        print(text, flush=True)

    def share(self, stage: str, done: float, left: float | None) -> None:
        """How far a stage is: a changing line on a terminal, elsewhere a line every `PAUSE` seconds."""
        now, fresh = time.monotonic(), stage != self._stage
        if not fresh and now - self._last < (BLINK if self.moving else PAUSE):
            return
        self._stage, self._last = stage, now
        text = f"{stage}: {done:.0%} of the whole{'' if left is None else f', {duration(left)} left'}"
        if self.moving:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write(f"\r{text[:width]:{width}}")
            self._shown = True
        else:
            sys.stderr.write(f"{text}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the line of progress away."""
        if self._shown:
            sys.stderr.write(f"\r{'':{shutil.get_terminal_size().columns - 1}}\r")
            sys.stderr.flush()
            self._shown = False
