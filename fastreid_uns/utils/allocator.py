"""How the C library keeps memory."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's malloc.h
_KEPT = 2**31 - 1  # bytes, the largest value that it takes


def raise_malloc_thresholds() -> bool:
    """Let malloc reuse large blocks that were freed, instead of giving them back to the system each time.

    A training step on a CPU frees and asks for hundreds of megabytes, which the system would clear page by page before
    they can be written again. The process holds on to what it once had; it stays so until it ends.

    Returns:
        Whether the C library knows how: glibc does, others are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
