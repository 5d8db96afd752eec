"""Ctrl-C and SIGTERM end a command soon, with one line."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

GRACE = 3.0  # seconds from the signal until the process ends, whatever it is doing

logger = logging.getLogger(__name__)


class Ending:
    """What happens when a command is told to end.

    Args:
        last_line: what to say; None says nothing.
    """

    def __init__(self, last_line: Callable[[], str | None]) -> None:
        self.last_line = last_line
        self.signal: int | None = None
        self._interrupted = False
        self._said = threading.Lock()

    def interrupt(self, number: int, _frame: object) -> None:
        """Handle the first signal as Ctrl-C; the ones after it change nothing."""
        if not self._interrupted:
            self._interrupted, self.signal = True, number
            raise KeyboardInterrupt

    def say(self) -> None:
        """Write the last line, once."""
        if self._said.acquire(blocking=False) and (line := self.last_line()):
            logger.debug("%s", line)
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()

    def end(self) -> NoReturn:
        """End the process: at once after a signal, else (an interrupt that was raised by hand) as Python does.

        Python's own way would wait for every thread and child, up to minutes.
        """
        self.say()
        if self.signal is None:
            raise SystemExit(128 + signal.SIGINT)
        for child in multiprocessing.active_children():
            child.kill()
        logging.shutdown()
        sys.stdout.flush()
        os._exit(128 + self.signal)

    def end_if_told(self) -> None:
        """End the process if a signal has come, although nothing of it has reached the end of the command."""
        if self.signal is not None:
            self.end()

    def enforce(self, notes: socket.socket) -> None:
        """End the process when its main thread does not: it may be inside a library, or wait for a queue."""
        while number := notes.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                self.signal = self.signal or number[0]
                time.sleep(GRACE)
                self.end()


@contextlib.contextmanager
def ending_at_signals(ending: Ending) -> Iterator[None]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt within the block, and end the process `GRACE` seconds later."""
    if threading.current_thread() is not threading.main_thread():  # handlers belong to the main one
        yield
        return
    notes, wakes = socket.socketpair()
    wakes.setblocking(False)
    before = {number: signal.signal(number, ending.interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    wake_before = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
    told_before, sys.unraisablehook = sys.unraisablehook, functools.partial(_unraisable, ending, sys.unraisablehook)
    threading.Thread(target=ending.enforce, args=(notes,), daemon=True).start()
    try:
        yield
    finally:
        if ending.signal is None:
            signal.set_wakeup_fd(wake_before)
            sys.unraisablehook = told_before
            for number, handler in before.items():
                signal.signal(number, handler)
            wakes.close()


def _unraisable(ending: Ending, tell: Callable[[Any], object], error: Any) -> None:
    """Be silent where Ctrl-C came in a finalizer, which swallows it; `Ending.enforce` ends the process then."""
    if not (ending.signal and error.exc_type is KeyboardInterrupt):
        tell(error)


def _leave_to_parent() -> None:
    """In a forked child: the parent hears Ctrl-C and ends it."""
    if isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Ending):
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


os.register_at_fork(after_in_child=_leave_to_parent)
