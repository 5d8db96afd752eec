"""What tells a list of images from another one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from fastreid_uns.structures import Record
from fastreid_uns.utils.paths import path_manager

_END = 4096  # bytes of each file that are read: its last ones, since the first ones are alike in many formats


def fingerprint(records: Sequence[Record]) -> str:
    """The same for equal lists of equal files, wherever their common folder is and whenever they were copied there.

    Names below the common folder, cameras, sizes and the last bytes of the files count, in order; identities do not.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    root = os.path.commonpath([os.path.dirname(record.path) for record in records]) if records else ""
    for record in records:
        file = Path(path_manager.get_local_path(record.path))
        size = file.stat().st_size
        with file.open("rb") as stream:
            stream.seek(max(0, size - _END))
            end = stream.read(_END)
        name = os.path.relpath(record.path, root)
        digest.update(f"{name}\0{record.camera}\0{size}\0".encode("utf-8", "surrogateescape"))
        digest.update(hashlib.sha256(end).digest())
    return digest.hexdigest()
