"""The folders groups/0001/...: links to the photos of each group, or copies."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from fastreid_uns.errors import InvalidState
from fastreid_uns.photos.files import own_folder, replacement
from fastreid_uns.photos.members import Member

GROUP_FOLDER = re.compile(r"\d{4,}")


def layout(members: Iterable[Member]) -> dict[str, str]:
    """Place of each photo below groups/: `0007/IMG 3.jpg`; `IMG 3-2.jpg` where two photos share a name."""
    taken: set[str] = set()
    places = {}
    for member in members:
        name = PurePosixPath(member.path)
        folder = f"{member.group:04d}"
        candidates = (f"{folder}/{stem}{name.suffix}" for stem in variants(name.stem))
        place = next(place for place in candidates if place.lower() not in taken)
        taken.add(place.lower())  # some disks do not tell a.jpg from A.jpg
        places[member.path] = place
    return places


def arrange(root: Path, wanted: Mapping[str, Path], copy: bool, former: Collection[str]) -> None:
    """Make links or copies of photos below a folder; files that somebody else put there stay.

    Args:
        wanted: photo for each place below `root`, see `layout`.
        copy: write copies of the photos, not links to them.
        former: places of copies that an earlier call made: only these are ever deleted.

    Raises:
        InvalidState: `root` is a link or a file, or the disk does not allow it.
    """
    own_folder(root)
    try:
        for file in _files(root):
            place = file.relative_to(root).as_posix()
            if (file.is_symlink() or place in former) and not _is_in_place(file, wanted.get(place), copy):
                file.unlink()
        for place, photo in wanted.items():
            own_folder((root / place).parent)
            if not os.path.lexists(root / place):
                _copy(photo, root / place) if copy else (root / place).symlink_to(photo)
        for folder in root.iterdir():
            if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
                folder.rmdir()
    except OSError as error:
        raise InvalidState(f"{root}: the folders of the groups could not be written ({error}).") from error


def variants(name: str) -> Iterator[str]:
    """The name, then name-2, name-3, ..."""
    yield name
    number = 2
    while True:
        yield f"{name}-{number}"
        number += 1


def _files(root: Path) -> list[Path]:
    """Files and links in the folders of the groups, and links among these folders themselves."""
    found = []
    for folder in root.iterdir():
        if folder.is_symlink():
            found.append(folder)
        elif folder.is_dir() and GROUP_FOLDER.fullmatch(folder.name):
            found += [file for file in folder.iterdir() if file.is_symlink() or file.is_file()]
    return found


def _is_in_place(file: Path, photo: Path | None, copy: bool) -> bool:
    if photo is None:
        return False
    if copy:
        return not file.is_symlink() and _same_content(file, photo)
    return file.is_symlink() and file.readlink() == photo


def _same_content(file: Path, photo: Path) -> bool:
    one, other = file.stat(), photo.stat()
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)  # copy2 keeps the time


def _copy(photo: Path, file: Path) -> None:
    with replacement(file) as stream, photo.open("rb") as original:
        shutil.copyfileobj(original, stream)
    shutil.copystat(photo, file)
