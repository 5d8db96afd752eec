"""Files that are written whole or not at all, and never through a link that somebody else has put in their place."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """A stream beside `file`, to be read and written, that takes its place when the block ends well.

    A block that fails or is killed leaves the old file. What a killed one has left beside it goes at the next try, so
    two processes must not replace the same file at once.

    Raises:
        OSError: the disk is full or not writable; nothing half-written stays.
    """
    for left in file.parent.glob(f".{glob.escape(file.name)}.*.part"):
        left.unlink(missing_ok=True)
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}.part")
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    try:
        with os.fdopen(descriptor, "w+b") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def append(file: Path, data: bytes) -> None:
    """Add to the end of a file, which is made if it is not there.

    Raises:
        OSError: the disk is full or not writable, or a link is in its place; the file is as it was.
    """
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if os.write(descriptor, data) < len(data):
            os.ftruncate(descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
