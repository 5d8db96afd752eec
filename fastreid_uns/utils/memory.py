"""How much memory there is, and how memory of mapped files is given back."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import torch

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container


def total_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine or what its container may use of it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or the word "max"
            found = min(found, int(limit.read_text()))
    return found


def drop_pages(mapping: mmap.mmap) -> None:
    """Give back the memory of a mapped file; what is read again comes from the file. Some systems do so by themselves.

    What was written to a private mapping is lost.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        mapping.madvise(mmap.MADV_DONTNEED)
