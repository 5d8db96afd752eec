"""Loops compiled by numba, and the threads that share their rows; imported only when first used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba
import numpy as np
import torch

from fastreid_uns.utils import sharing


def compiled(function: Callable, *allowed: str) -> Any:
    """The function as machine code that runs without the interpreter lock, kept on disk.

    Args:
        allowed: liberties with floating point that LLVM may take, such as `reassoc`.
    """
    flags: dict[str, Any] = {"nogil": True, "fastmath": set(allowed)}
    try:
        dispatcher = numba.njit(cache=True, **flags)(function)
    except RuntimeError:  # neither the package nor the home of the user can hold a compiled file
        return numba.njit(**flags)(function)
    cache = dispatcher._cache
    save = cache.save_overload

    def save_if_possible(signature: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # a full disk costs the next start a compilation, not this run its life
            save(signature, data)

    cache.save_overload = save_if_possible
    return dispatcher


class Workers:
    """Threads that share the rows of a kernel, as many as torch uses; a context manager."""

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        # asked for the number, a thread takes over torch's; else its products of 8 bits would take all processors
        self.pool = ThreadPoolExecutor(self.count, initializer=torch.get_num_threads)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown()

    def over_rows(self, kernel: Callable, rows: int, *args: Any, slabs: int = 8) -> list[Any]:
        """Results of `kernel(start, stop, *args)` over the rows 0..rows-1 in order, `slabs` calls for each thread."""
        if self.count == 1 or rows < 64:
            return [kernel(0, rows, *args)]
        cuts = np.linspace(0, rows, min(slabs * self.count, rows) + 1).astype(np.int64).tolist()
        return list(self.pool.map(lambda a, b: kernel(a, b, *args), cuts[:-1], cuts[1:]))

    def over_shared_rows(
        self, kernel: Callable, rows: int, *args: Any, slabs: int = 8, first_only: bool = False
    ) -> list[Any]:
        """As `over_rows`, with the rows dealt out to the processes that share loops; each gets the results of all.

        Args:
            first_only: the others get nothing.
        """
        if sharing.ranks() == 1:
            return self.over_rows(kernel, rows, *args, slabs=slabs)
        cuts = np.linspace(0, rows, min(4 * slabs * sharing.ranks(), rows) + 1).astype(np.int64).tolist()
        own = sharing.dealt(list(pairwise(cuts)))
        found = list(self.pool.map(lambda cut: kernel(*cut, *args), own))
        every = sharing.on_first(found) if first_only else sharing.from_all(found)
        return sharing.in_order(every) if every else []

    def joined(self, parts: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        """The arrays of all parts, one after the other; `parts` are given up, so that memory holds them once."""
        columns = [list(arrays) for arrays in zip(*parts, strict=True)]
        parts.clear()
        return tuple(self._joined(arrays) for arrays in columns)

    def _joined(self, arrays: list[np.ndarray]) -> np.ndarray:
        if len(arrays) == 1:
            return arrays[0]
        cuts = np.cumsum([0, *map(len, arrays)])
        result = np.empty(cuts[-1], arrays[0].dtype)

        def copy(at: int) -> None:
            result[cuts[at] : cuts[at + 1]] = arrays[at]
            arrays[at] = result[:0]

        list(self.pool.map(copy, range(len(arrays))))
        return result


def over_rows(kernel: Callable, rows: int, *args: Any, slabs: int = 8) -> list[Any]:
    """`Workers.over_rows` for a single kernel."""
    with Workers() as workers:
        return workers.over_rows(kernel, rows, *args, slabs=slabs)
