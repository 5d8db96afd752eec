"""Files of a run, written whole or not at all; a disk that does not allow it is something a user can mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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
