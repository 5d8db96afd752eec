"""Files and folders of a run: written whole or not at all; a disk that does not allow it is for a user to mend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastreid_uns.errors import InvalidState
from fastreid_uns.utils.atomic import replacing


@contextmanager
def replacement(file: Path) -> Iterator[BinaryIO]:
    """A stream that takes the place of `file` when the block ends well; links are replaced, not followed.

    Raises:
        InvalidState: the disk is full or not writable; `file` is as it was before.
    """
    try:
        with replacing(file) as stream:
            yield stream
    except OSError as error:
        raise InvalidState(
            f"{file}: the file could not be written ({error.strerror or error}); what was there before is untouched. "
            f"Free some space or choose another output folder, then run the same command again."
        ) from error


def write_file(file: Path, content: bytes) -> None:
    """Replace `file` by `content`; see `replacement` for what may be raised."""
    with replacement(file) as stream:
        stream.write(content)


def write_json(file: Path, content: Any) -> None:
    """Replace `file` by what JSON says of `content`; its folder is made."""
    own_folder(file.parent)
    write_file(file, f"{json.dumps(content, indent=2)}\n".encode())


def own_folder(folder: Path) -> None:
    """Make a folder of the run.

    Raises:
        InvalidState: it is a symbolic link or a file, or the disk does not allow it.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InvalidState(f"{folder}: the folder could not be made ({error}). Move away what is there.") from error
    if folder.is_symlink():
        raise InvalidState(f"{folder}: is a symbolic link; nothing is written through it. Remove the link.")
