"""Loops whose work the processes of a run share, each with its part of the rows.

Inside `by_all_ranks` every process runs the same code on equal inputs. A loop takes the items that are `dealt` to its
process and gets the results of all by `from_all`, so that each process goes on with the same numbers as one alone.
Outside of it, and in a single process, all items are dealt to the process itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from fastreid_uns.errors import FailedElsewhere
from fastreid_uns.utils import comm

T = TypeVar("T")

_shared = False


@contextmanager
def by_all_ranks() -> Iterator[None]:
    """Share the loops of the block, which all processes must run alike; after an error of one, none is kept waiting.

    Raises:
        RuntimeError: `FailedElsewhere`, if another process has left the block by an error.
    """
    global _shared
    _shared = comm.world() > 1
    try:
        yield
        _agree()
    except FailedElsewhere:
        raise
    except Exception as error:
        if _shared:
            comm.gather_objects(f"{type(error).__name__}: {error}")
        raise
    finally:
        _shared = False


def _agree() -> None:
    """Go on if all processes do; what precedes each exchange, so that a failed process is heard at the next one."""
    if _shared:
        for rank, reason in enumerate(comm.gather_objects(None)):
            if reason is not None:
                raise FailedElsewhere(f"process {rank}: {reason}")


def ranks() -> int:
    """Number of processes that share the loops."""
    return comm.world() if _shared else 1


def first() -> bool:
    """Whether this process does what only one does."""
    return not _shared or comm.rank() == 0


def dealt(items: Sequence[T]) -> Sequence[T]:
    """The items of this process: every W-th, so that all get of the early and of the late ones."""
    return items[comm.rank() :: comm.world()] if _shared else items


def is_own(at: int) -> bool:
    """Whether the item of this number is `dealt` to this process."""
    return not _shared or at % comm.world() == comm.rank()


def own_rows(count: int) -> range:
    """The rows of this process, which are neighbours; parts differ by one row at most."""
    cuts = _cuts(count)
    return range(cuts[comm.rank()], cuts[comm.rank() + 1]) if _shared else range(count)


def _cuts(count: int) -> list[int]:
    return [count * rank // ranks() for rank in range(ranks() + 1)]


def from_all(value: T) -> list[T]:
    """The values of all processes, on all of them."""
    _agree()
    return comm.gather_objects(value) if _shared else [value]


def on_first(value: T) -> list[T] | None:
    """The values of all processes on the first one, None on the others."""
    _agree()
    return comm.gather_on(0, value) if _shared else [value]


def from_first(action: Callable[[], T]) -> T:
    """What the first process finds by itself, on all; the others wait."""
    global _shared
    if not _shared:
        return action()
    _shared = False  # the loops of the action are all its own
    try:
        value = action() if comm.rank() == 0 else None
    finally:
        _shared = True
    _agree()
    return comm.broadcast_object(value)  # type: ignore[return-value]


def parts_of_own_rows(value: Tensor) -> list[Tensor]:
    """Of tensors (N, ...) that all processes hold, the `own_rows` of each: one from each process."""
    _agree()
    if not _shared:
        return [value]
    result: list[Tensor] = []
    for rank, (start, stop) in enumerate(zip(_cuts(len(value))[:-1], _cuts(len(value))[1:], strict=True)):
        result = comm.gather_on(rank, value[start:stop].clone()) or result
    return result


def in_order(results: list[list[T]]) -> list[T]:
    """The results of items that were `dealt`, in the order of the items, of the lists of all processes."""
    return [results[at % len(results)][at // len(results)] for at in range(sum(map(len, results)))]


def equal_on_all(value: Tensor) -> bool:
    """Whether all processes hold the same bits, told by sums over columns and over rows."""
    bits = value.detach().float().contiguous().view(torch.int32)
    sums = [bits.sum(dim, dtype=torch.int64).cpu() for dim in range(bits.dim())]
    every = comm.gather_objects(sums)
    return all(len(a) == len(b) and torch.equal(a, b) for other in every for a, b in zip(sums, other, strict=True))
