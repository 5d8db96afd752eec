"""From the host to a device, and work on the device that need not be waited for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Tensor, device

T = TypeVar("T")


def to_device(value: Tensor, device: device) -> Tensor:
    """The tensor on a device; from the CPU to CUDA through pinned memory, so that the host does not wait."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded one cannot be pinned
    return value.to(device)


def made_ahead(items: Iterator[T], device: device) -> Iterator[T]:
    """The items; CUDA makes each on a stream of its own while it works with the one before.

    That stream waits for all that was done before an item was asked for, so the memory of an earlier one, to which
    nothing refers any more, can be written again.
    """
    if device.type != "cuda":
        yield from items
        return
    import torch

    side = torch.cuda.Stream(device)

    def following() -> tuple[T, torch.cuda.Event] | None:
        """The next item, and the moment from which it is there."""
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            item = next(items, None)
            return None if item is None else (item, side.record_event())

    coming = following()
    while coming is not None:
        item, ready = coming
        coming = following()
        torch.cuda.current_stream(device).wait_event(ready)
        yield item
