"""From the host to a device."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, device


def to_device(value: Tensor, device: device) -> Tensor:
    """The tensor on a device; from the CPU to CUDA through pinned memory, so that the host does not wait."""
    if device.type == "cuda" and value.device.type == "cpu":
        return value.contiguous().pin_memory().to(device, non_blocking=True)  # an expanded one cannot be pinned
    return value.to(device)
