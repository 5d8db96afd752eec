"""Files that a command gives: whole or not at all, never through a link in their place."""

from __future__ import annotations

from pathlib import Path

from fastreid_uns.errors import InvalidState
from fastreid_uns.photos.files import write_file


def make_folder(folder: Path) -> None:
    """Make a folder for results if it is not there.

    Raises:
        InvalidState: the disk does not allow it, or a file is in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidState(
            f"{folder}: the folder cannot be made ({error.strerror or error}). Choose another output."
        ) from error


def write_output(file: Path, content: bytes) -> None:
    """Write a file and, where needed, its folder.

    Raises:
        InvalidState: the disk does not allow it; what was there before is untouched.
    """
    make_folder(file.parent)
    write_file(file, content)
