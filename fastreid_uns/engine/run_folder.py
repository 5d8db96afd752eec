"""`OUTPUT_DIR`: one run at a time in it, no run over another, and nothing changed before a run is accepted."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastreid_uns.errors import InvalidState, InvalidValue, UserError
from fastreid_uns.utils.atomic import replacing

LOCK = ".lock"
_IN_ITS_PLACE = {errno.ELOOP: "a symbolic link, which is never followed,", errno.EISDIR: "a folder"}


class RunFolder:
    """The folder of a run, as the first process of the run sees it.

    Args:
        folder: `OUTPUT_DIR`; made by `claim`.
    """

    current: RunFolder | None = None  # the one that this process claimed last

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._lock: _Lock | None = None

    def holds_run(self) -> bool:
        """Whether a run has saved a checkpoint or written numbers there."""
        metrics = self.path / "metrics.jsonl"
        return self.holds_checkpoint() or (metrics.is_file() and metrics.stat().st_size > 0)

    def holds_checkpoint(self) -> bool:
        """Whether there is something to resume from."""
        from fastreid_uns.utils.checkpoint import numbered_checkpoints

        return bool(numbered_checkpoints(self.path))

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint from which the run would go on."""
        from fastreid_uns.utils.checkpoint import last_checkpoint

        try:
            return last_checkpoint(self.path)
        except UserError:
            return None

    def make(self) -> None:
        """Make the folder if it is not there.

        Raises:
            ValueError: a file is in its place.
            RuntimeError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InvalidValue(
                f"OUTPUT_DIR: {self.path} is a file or is below one; a folder is needed. Choose another OUTPUT_DIR."
            ) from error
        except OSError as error:
            raise unwritable(self.path, error) from error

    def claim(self) -> None:
        """Make the folder and keep other processes out of it until `release`, or until this process ends.

        Raises:
            ValueError: a file is in its place.
            RuntimeError: it cannot be made or written, or another process uses it.
        """
        if self._lock is None:
            self.make()
            self._lock = _lock_of(self.path)
        RunFolder.current = self

    def accept(self, files: Mapping[str, str]) -> None:
        """Write the files that describe the run, now that it is certain to go on.

        Raises:
            RuntimeError: the disk is full or not writable.
        """
        self.claim()
        if self._lock is not None:
            self._lock.sign()
        for name, text in files.items():
            self._write(name, text)

    def release(self) -> None:
        """Let other processes in."""
        self._lock = None

    @contextlib.contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Give the folder back if the block fails."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def refuse_a_run(self) -> None:
        """Raise if the folder holds a run that a new one would overwrite.

        Raises:
            ValueError: it does.
        """
        if self.holds_run():
            newest = self.newest_checkpoint()
            found = newest.name if newest else "metrics.jsonl, without a checkpoint"
            raise InvalidValue(
                f"{self.path} holds a run already ({found}). Continue it with --resume, "
                f"choose another OUTPUT_DIR, or delete the folder."
            )

    def _write(self, name: str, text: str) -> None:
        """Write a file whole or not at all; a link in its place is replaced, not followed."""
        try:
            with replacing(self.path / name) as stream:
                stream.write(text.encode())
        except OSError as error:
            raise unwritable(self.path / name, error) from error

    def how_to_go_on(self) -> str:
        """What is saved, and what to type to continue, in one sentence."""
        newest = self.newest_checkpoint()
        if newest is None:
            return f"no epoch is saved in {self.path} yet; the same command with --resume starts from the beginning."
        return f"{newest} is saved; the same command with --resume goes on from there."


def unwritable(path: Path, error: OSError) -> InvalidState:
    """The error for a file or folder of the run that cannot be written."""
    if error.errno in _IN_ITS_PLACE:
        return InvalidState(
            f"OUTPUT_DIR: {path} cannot be written: {_IN_ITS_PLACE[error.errno]} is in its place, a file is needed. "
            f"Move it away, or choose another OUTPUT_DIR."
        )
    return InvalidState(
        f"OUTPUT_DIR: {path} cannot be written ({error.strerror or error}); a folder with free space is needed. Free "
        f"some space, change its permissions, or choose another OUTPUT_DIR."
    )


class _Lock:
    """A lock on a folder that the system releases when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK
        fresh = not self.file.exists()
        self._stream = self._acquired()
        self._signed: list[Path] = []
        self._release = weakref.finalize(self, _unlock, self._stream, self._signed)
        if fresh:  # what a killed run has left stays as it is until a run is accepted
            self.sign()

    def _acquired(self) -> int:
        while True:
            try:
                stream = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise unwritable(self.file, error) from error
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_there(stream):
                    return stream
                os.close(stream)  # its last holder has removed it meanwhile
            except OSError as error:
                holder = os.read(stream, 200).decode("utf-8", "replace").strip() or "another process"
                os.close(stream)
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise unwritable(self.file, error) from error
                raise InvalidState(
                    f"OUTPUT_DIR: {self.file.parent} is in use by {holder}; one run at a time can write there. "
                    f"Wait for its end, or choose another OUTPUT_DIR."
                ) from None

    def _is_there(self, stream: int) -> bool:
        try:
            return os.path.samestat(os.stat(self.file, follow_symlinks=False), os.fstat(stream))
        except FileNotFoundError:
            return False

    def sign(self) -> None:
        """Write down who holds it; from now on the file goes when the lock is released."""
        name = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        try:
            os.truncate(self._stream, 0)
            os.pwrite(self._stream, name.encode(), 0)
        except OSError as error:
            raise unwritable(self.file, error) from error
        self._signed[:] = [self.file]

    def leave_to_parent(self) -> None:
        """In a forked child: close its copy, so that the lock ends with the parent."""
        self._release.detach()
        os.close(self._stream)


def _unlock(stream: int, signed: list[Path]) -> None:
    for file in signed:
        file.unlink(missing_ok=True)
    os.close(stream)


# a process may have several trainers of one folder, one after the other
_held: weakref.WeakValueDictionary[Path, _Lock] = weakref.WeakValueDictionary()


def _lock_of(folder: Path) -> _Lock:
    place = folder.resolve()
    lock = _held.get(place)
    if lock is None:
        lock = _held[place] = _Lock(place)
    return lock


def _after_fork() -> None:
    for lock in list(_held.values()):
        lock.leave_to_parent()
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)
