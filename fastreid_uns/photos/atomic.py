"""Files that are written whole or not at all, and never through a planted link."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastreid_uns.errors import InvalidState


@contextmanager
def replacement(file: Path, lasting: bool = True) -> Iterator[Path]:
    """An empty file beside `file`, for the body to fill; it takes the place of `file` when the body ends well.

    Its name cannot be guessed and it is made with O_EXCL and O_NOFOLLOW. If `file` is a symbolic link, the link is
    replaced, not what it leads to.

    Args:
        lasting: the content has reached the disk when the name does; not needed for what can be made again.

    Raises:
        InvalidState: the disk is full or not writable; `file` is as it was before.
    """
    part = file.with_name(f".{secrets.token_hex(12)}.part")
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))
        yield part
        if lasting:
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
        part.replace(file)
    except OSError as error:
        raise InvalidState(
            f"{file}: the file could not be written ({error.strerror or error}); what was there before is untouched. "
            f"Free some space or choose another output folder, then run the same command again."
        ) from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_file(file: Path, content: bytes, lasting: bool = True) -> None:
    """Replace `file` by `content`; see `replacement` for the rest."""
    with replacement(file, lasting) as part:
        part.write_bytes(content)
