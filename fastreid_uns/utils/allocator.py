"""How the C library keeps memory."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # names of glibc's malloc.h
_KEPT = 2**31 - 1  # bytes, the largest value that it takes
_LARGE = 2**25  # bytes, the largest threshold that it takes


def raise_malloc_thresholds(*, large: bool = True) -> bool:
    """Let malloc reuse large blocks that were freed, instead of giving them back to the system each time.

    A training step on a CPU frees and asks for hundreds of megabytes, which the system would clear page by page before
    they can be written again. The process holds on to what it once had; it stays so until it ends.

    Args:
        large: also blocks of more than 32 MiB. glibc may not find a large aligned block again when one of the same size
            is asked for, so work on large blocks that differ takes more memory.

    Returns:
        Whether the C library knows how: glibc does, others are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = mallopt(_MMAP_MAX, 0) if large else mallopt(_MMAP_THRESHOLD, _LARGE)
    return bool(kept) and bool(mallopt(_TRIM_THRESHOLD, _KEPT))
