"""The output folder of a set of photos: who is in which group, how it came to this, and what a run can go on from.

    groups.csv                path,group,confidence,nearest,similarity; one row a photo
    groups/0001/...           links to the photos (or copies), one folder a group
    history/groups-0001.csv   every earlier version of groups.csv
    run.json                  folders, settings, weights, audit, seconds: what the commands and the report tell
    state/                    what the next command goes on from; it can be deleted
    decisions.csv, index.safetensors, report.html, report/    see decisions.py, index.py, report.py

Paths are relative to the folder of photos and use `/`. Photos of a folder that was added later have the name of that
folder in front; `run.json` says where it is. Bytes of a name that are no UTF-8 are kept (surrogateescape).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile
from fastreid_uns.photos.files import own_folder, write_file, write_json
from fastreid_uns.photos.group_folders import arrange, layout, variants
from fastreid_uns.photos.members import Member, groups_text, read_groups
from fastreid_uns.utils.places import path_of


class PhotoRun:
    """The output folder. Reads what is there; writes atomically and nowhere else.

    Args:
        folder: the output folder.

    Raises:
        MissingFile: no run.json in it. `PhotoRun.create` makes one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = path_of(str(folder))
        if not self._about_file.is_file():
            raise MissingFile(
                f"{self.folder}: no grouped photos were found (run.json is missing). Name the folder that "
                f"`fastreid-uns group PHOTOS --output` wrote."
            )

    @classmethod
    def create(cls, folder: str | Path, photos: str | Path) -> PhotoRun:
        """Begin a run for the photos of a folder; a run of the same photos that is there already is opened.

        Raises:
            InvalidState: the output folder belongs to other photos, is a file, or cannot be written.
        """
        folder, photos = Path(folder), Path(os.path.realpath(photos))
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidState(f"{folder}: the output folder cannot be made ({error}). Choose another.") from error
        if not (folder / "run.json").exists():
            write_json(folder / "run.json", {"version": 0, "photos": str(photos), "added": {}, "last_number": 0})
        run = cls(folder)
        if run.photos != photos:
            raise InvalidState(
                f"{folder}: this folder holds groups of {run.photos}, not of {photos}. Choose another output folder, "
                f"or add photos with `fastreid-uns add`."
            )
        return run

    @property
    def _about_file(self) -> Path:
        return self.folder / "run.json"

    # what is known of the run

    @property
    def about(self) -> dict[str, Any]:
        """The content of run.json.

        Raises:
            InvalidValue: the file is damaged.
        """
        try:
            about = json.loads(self._about_file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise InvalidValue(f"{self._about_file}: cannot be read as JSON ({error}). Restore it.") from error
        if not isinstance(about, dict) or not isinstance(about.get("photos"), str):
            raise InvalidValue(f"{self._about_file}: lacks the folder of the photos. Restore the file.")
        return about

    def update(self, **about: Any) -> None:
        """Set entries of run.json; the others stay."""
        write_json(self._about_file, {**self.about, **about})

    @property
    def version(self) -> int:
        """Number of the present groups.csv, from 1; 0 before the first. It follows from the history, so that a run
        killed between two files is never a version ahead."""
        return len(self.history()) + self.groups_file.is_file()

    @property
    def last_number(self) -> int:
        """Highest number that a group ever had."""
        return int(self.about.get("last_number", 0))

    # where the photos are

    @property
    def photos(self) -> Path:
        """Folder of the photos with which the run began."""
        return Path(self.about["photos"])

    def add_folder(self, folder: str | Path) -> str:
        """Make the photos of another folder part of this run.

        Returns:
            What their paths begin with, such as `season 2/`; `""` for the folder with which the run began.
        """
        folder = Path(os.path.realpath(folder))
        about = self.about
        for prefix, known in {"": about["photos"], **about.get("added", {})}.items():
            if folder.is_relative_to(known):
                return "".join(f"{part}/" for part in (prefix, *folder.relative_to(known).parts) if part)
        taken = {*about.get("added", {}), *(member.path.split("/")[0] for member in self.groups())}
        taken |= set(os.listdir(about["photos"])) if Path(about["photos"]).is_dir() else set()
        name = next(name for name in variants(folder.name or "photos") if name not in taken)
        self.update(added={**about.get("added", {}), name: str(folder)})
        return f"{name}/"

    def photo(self, path: str) -> Path:
        """File of a photo that groups.csv names.

        Raises:
            InvalidValue: the path is absolute or leads out of the folders of the run.
        """
        return resolve(self.about, path)

    # groups

    @property
    def groups_file(self) -> Path:
        return self.folder / "groups.csv"

    def groups(self, version: int | None = None) -> list[Member]:
        """Rows of groups.csv, or of an earlier version of it; empty before the first.

        Raises:
            InvalidValue: a row cannot be read; the message names it.
            MissingFile: no such version.
        """
        if version is None or version == self.version:
            return read_groups(self.groups_file) if self.groups_file.is_file() else []
        file = self._history_file(version)
        if not file.is_file():
            raise MissingFile(f"{file}: no such version; {self.version} is the newest. Choose an earlier one.")
        return read_groups(file)

    def history(self) -> list[int]:
        """Numbers of the earlier versions, the oldest first."""
        names = (re.fullmatch(r"groups-(\d+)\.csv", file.name) for file in self.folder.glob("history/*.csv"))
        return sorted(int(name[1]) for name in names if name)

    def write_groups(self, members: Sequence[Member], **about: Any) -> int:
        """Make these the groups; the groups so far become history.

        Args:
            about: entries of run.json that describe them.

        Returns:
            Number of the new version.

        Raises:
            InvalidValue: a photo occurs twice, a number is below 1, a path leads out of the folder.
        """
        known = self.about
        for path, times in Counter(member.path for member in members).items():
            resolve(known, path)
            if times > 1:
                raise InvalidValue(f"groups: {path!r} occurs {times} times; each photo once is accepted.")
        content = groups_text(members)
        if self.groups_file.is_file():
            earlier = self._history_file(self.version)
            own_folder(earlier.parent)
            write_file(earlier, self.groups_file.read_bytes())
        write_file(self.groups_file, content)
        last = max(self.last_number, *(member.group for member in members), 0)
        self.update(**about, version=self.version, last_number=last, photo_count=len(members))
        return self.version

    def restore(self, version: int) -> int:
        """Make an earlier version the present one again, as a new version; gives its number."""
        return self.write_groups(self.groups(version))

    def _history_file(self, version: int) -> Path:
        return self.folder / "history" / f"groups-{version:04d}.csv"

    # folders of links

    def link_groups(self, copy: bool = False) -> None:
        """Bring groups/NNNN/ in line with groups.csv; see `group_folders.arrange`.

        Args:
            copy: write copies of the photos, not links to them.

        Raises:
            InvalidState: `groups` is a link or a file, or the disk does not allow it.
        """
        about, copies = self.about, self.folder / "state" / "copies.json"
        wanted = {place: resolve(about, path) for path, place in layout(self.groups()).items()}
        former = json.loads(copies.read_text(encoding="utf-8")) if copies.is_file() else []
        arrange(self.folder / "groups", wanted, copy, set(former))
        write_json(copies, sorted(wanted) if copy else [])

    # what the review page asks

    def save_questions(self, pairs: Sequence[tuple[str, str, float]]) -> None:
        """Keep (photo, photo, weight) of pairs whose answers would tell most about the present groups."""
        write_json(self.folder / "state" / "questions.json", {"version": self.version, "pairs": pairs})

    def questions(self) -> list[tuple[str, str, float]] | None:
        """The pairs that were kept; None if there are none for the present groups."""
        file = self.folder / "state" / "questions.json"
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            return (
                [(str(a), str(b), float(w)) for a, b, w in kept["pairs"]] if kept["version"] == self.version else None
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    # going on after an interruption

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to this folder. A killed process leaves no lock behind.

        Raises:
            InvalidState: another process holds the lock, or the folder cannot be written.
        """
        try:
            descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise InvalidState(
                f"{self.folder}: cannot be written ({error.strerror}). Choose another folder."
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise InvalidState(
                f"{self.folder}: another process works on this folder. Wait for its end, or choose another one."
            ) from error
        finally:
            os.close(descriptor)

    def save_state(self, name: str, fingerprint: str, arrays: Mapping[str, NDArray]) -> None:
        """Keep arrays for the next command, or for the case that this one is interrupted.

        Args:
            fingerprint: of all that the arrays depend on; a state with another one is never read.
        """
        own_folder(self.folder / "state")
        contiguous = {key: np.ascontiguousarray(value) for key, value in arrays.items()}
        write_file(self._state_file(name), save(contiguous, metadata={"fingerprint": fingerprint}))

    def state(self, name: str, fingerprint: str) -> dict[str, NDArray] | None:
        """Arrays that were kept under this name and fingerprint; None if there are none or they are damaged."""
        try:
            with safe_open(self._state_file(name), framework="numpy") as content:
                if (content.metadata() or {}).get("fingerprint") != fingerprint:
                    return None
                return {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None

    def _state_file(self, name: str) -> Path:
        return self.folder / "state" / f"{name}.safetensors"


def resolve(about: Mapping[str, Any], path: str) -> Path:
    """File of a path of groups.csv, with the folders that run.json (`about`) names.

    Raises:
        InvalidValue: the path is absolute, has `..` or a NUL in it, or is empty.
    """
    parts = path.split("/")
    if not path or "\0" in path or {"", ".", ".."} & set(parts):
        raise InvalidValue(
            f"groups: {path!r} leads out of the folder of the photos; relative paths without '..' are accepted."
        )
    added = about.get("added", {})
    if parts[0] in added and len(parts) > 1:
        return Path(added[parts[0]], *parts[1:])
    return Path(about["photos"], *parts)
