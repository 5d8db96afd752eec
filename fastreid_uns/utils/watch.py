"""Several processes: one that stands still, or is gone without a word, ends the others with a message."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

logger = logging.getLogger(__name__)


def store_of_run(prefix: str, patience: float = 300.0) -> dist.Store:
    """The store that `torchrun` gives to the processes of a run, over a connection of its own.

    Args:
        prefix: of the keys.
        patience: seconds to wait for the connection.

    Raises:
        RuntimeError: no connection.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    limit = timedelta(seconds=patience)
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=limit)
    return dist.PrefixStore(f"{prefix}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Place(NamedTuple):
    """Where a process is."""

    beat: int  # grows as long as the process lives
    step: int  # optimiser steps done
    stage: str


class Watch:
    """A thread that tells the other processes where this one is, and ends it when another one stands still.

    A process stands still when it has not told its place for `timeout`, as one that is suspended, or when it is at an
    earlier optimiser step than this one for as long, as one whose disk hangs. A stage that one process does for all,
    such as clustering, may take any time.

    Args:
        store: through which the processes tell their places.
        rank: of this process.
        world: number of processes.
        timeout: seconds.
        end: called with the message; by default it goes to the log and to stderr, and the process ends with code 2.
    """

    def __init__(
        self, store: dist.Store, rank: int, world: int, timeout: float, end: Callable[[str], None] | None = None
    ) -> None:
        self.store = store
        self.rank = rank
        self.world = world
        self.timeout = timeout
        self.end = end or _end_process
        self._place = Place(0, 0, "start")
        self._seen: dict[int, tuple[Place, float, float]] = {}  # place, since when it lives, since when at its step
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @classmethod
    def from_environment(cls, timeout: float) -> Watch:
        """The watch of a process that `torchrun` has started, at work."""
        watch = cls(store_of_run("watch"), dist.get_rank(), dist.get_world_size(), timeout)
        watch._thread.start()
        return watch

    def report(self, step: int, stage: str) -> None:
        """Note where this process is."""
        self._place = self._place._replace(step=step, stage=stage)

    def stop(self) -> None:
        """Tell the others that this process has ended well, and watch no longer."""
        self._stopped.set()
        with contextlib.suppress(RuntimeError):
            self.store.set(str(self.rank), "ended")

    def check(self, now: float) -> str | None:
        """Tell the own place, read those of the others, and give a message if one stands still.

        Args:
            now: seconds, by any clock that only grows.
        """
        self._place = own = self._place._replace(beat=self._place.beat + 1)
        self.store.set(str(self.rank), f"{own.beat} {own.step} {own.stage}")
        for rank in range(self.world):
            if rank != self.rank and (message := self._check_one(rank, own, now)):
                return message
        return None

    def _check_one(self, rank: int, own: Place, now: float) -> str | None:
        text = self.store.get(str(rank)).decode() if self.store.check([str(rank)]) else "0 0 start"
        if text == "ended":
            return None
        beat, step, stage = text.split(" ", 2)
        place = Place(int(beat), int(step), stage)
        before, lives, there = self._seen.get(rank, (place, now, now))
        lives = lives if place.beat == before.beat else now
        there = there if place.step == before.step and own.step > place.step else now
        self._seen[rank] = place, lives, there
        where = (
            f"; its last stage: {place.stage}, after {place.step} steps of the run; process {self.rank}: {own.stage}"
        )
        silent, behind = now - lives, now - there
        if max(silent, behind) < self.timeout:
            return None
        fault = f"not answered for {silent:.0f}" if silent >= self.timeout / 2 else f"made no step for {behind:.0f}"
        return _MESSAGE.format(f"process {rank} has {fault} s{where}")

    def _run(self) -> None:
        while not self._stopped.wait(min(10.0, self.timeout / 10)):
            try:
                message = self.check(time.monotonic())
            except RuntimeError:  # the store is gone, and with it the process that started this one
                return
            if message and not self._stopped.is_set():
                self.end(message)
                return


_MESSAGE = (
    "{}. Look into its log and at its machine; raise DISTRIBUTED.TIMEOUT_MINUTES if it is only slow. What is saved "
    "is kept, --resume goes on from there."
)


def _end_process(message: str) -> None:
    logger.debug("error: %s", message)
    sys.stderr.write(f"error: {message}\n")
    sys.stderr.flush()
    os._exit(2)  # the main thread waits inside a library, where no exception reaches it
