"""Pixels in one file that all processes map and that later runs use again.

`pixels-<height>x<width>-<owner>-<state>.bin` holds N x 3 x H x W bytes, then a JSON text (format, shape, a checksum for
each block of images, the images that could not be read) and the checksum of this text. `owner` is a digest of what the
images are to the run and of their folder, `state` one of the files themselves (path, size, times), so that changed
images get a file of their own.

A file appears complete or not at all. Who writes or maps one holds a lock on it, which ends with the process: whatever
has no lock may be removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import mmap
import os
import re
import secrets
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from os.path import commonpath, dirname
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.data.decode import UnreadableImage
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.errors import InvalidState, MissingFile, UserError
from fastreid_uns.utils.comm import barrier, broadcast_object, gather_objects, rank, world
from fastreid_uns.utils.environment import cores
from fastreid_uns.utils.paths import path_manager
from fastreid_uns.utils.progress import progress

try:
    import fcntl
except ImportError:  # no POSIX: nothing is locked, and so nothing is ever removed
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")
logger = logging.getLogger(__name__)

FORMAT = 3  # raise it when equal files would give other pixels
BLOCK = 256  # images of one checksum
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_KEY = "DATALOADER.CACHE disk"


class MappedPixels(NamedTuple):
    """The pixels of a set of N images in a file."""

    pixels: Tensor  # (N,3,H,W) uint8
    errors: dict[int, UserError]  # of images that cannot be read, by index; their pixels are 0
    mapping: mmap.mmap  # the memory of `pixels`


def map_pixels(images: ImageSet, folder: Path, what: str) -> MappedPixels:
    """The pixels of a set from its file, which is written first if there is none, or none that is whole.

    Processes share the work, also that of reading the checksums; all must call.

    Args:
        images: N images; decoded once if the file has to be written.
        folder: where the files are, on a file system that all processes see.
        what: the images are to the run, such as `DATASETS.TRAIN`; older files of the same owner are removed.

    Raises:
        RuntimeError: the file cannot be written.
    """
    shape = (len(images), 3, *images.size)
    owner, state = broadcast_object((_owner(images, what), _state(images)) if rank() == 0 else ("", ""))
    start = f"pixels-{images.size[0]}x{images.size[1]}"
    file = folder / f"{start}-{owner}-{state}.bin"
    there = any(gather_objects(os.path.lexists(file)))
    found = _open(file, shape)
    whole = found is not None and _is_whole(*found[:2])
    if all(gather_objects(whole)):
        logger.info("%s: pixels of %s images from %s", what, f"{len(images):,}", file)
    else:
        if there and rank() == 0:
            logger.warning("%s: %s is damaged or cut off; it is written again.", _KEY, file)
        found = None
        _build(images, file, shape)
        found = _open(file, shape)
    if rank() == 0:
        _remove_outdated(folder, re.compile(rf"{start}-({owner}-)?[0-9a-f]{{16}}\.bin"), file.name)
    barrier()
    if found is None:
        raise InvalidState(f"{_KEY}: {file} was changed while it was written. Give each run a folder of its own.")
    pixels, content, mapping = found
    errors = {int(i): _error(images.paths[int(i)], *said) for i, said in content["unreadable"].items()}
    return MappedPixels(pixels, errors, mapping)


def gib(shape: tuple[int, ...]) -> str:
    """The memory that uint8 of a shape needs."""
    return f"{np.prod(shape, dtype=float) / 2**30:.2f} GiB"


def _owner(images: ImageSet, what: str) -> str:
    folder = commonpath([dirname(path) for path in images.paths])
    return hashlib.sha256(f"{what}\0{folder}".encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _state(images: ImageSet) -> str:
    """A digest of the list and of what the file system says of each file; renaming changes the time of a change."""
    digest = hashlib.sha256(f"{FORMAT} {images.size}".encode())
    for path in images.paths:
        try:
            found = os.stat(path_manager.get_local_path(path))
            stamp = f"{found.st_size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}"
        except OSError:
            stamp = "missing"
        digest.update(f"\n{path}\0{stamp}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _open(file: Path, shape: tuple[int, ...]) -> tuple[Tensor, dict[str, Any], mmap.mmap] | None:
    """The mapped pixels, the content of the text behind them, and the mapping; None where there is no such file."""
    size = int(np.prod(shape))
    try:
        with open(os.open(file, os.O_RDONLY | _NO_FOLLOW), "rb") as stream:
            _lock(stream.fileno(), shared=True)  # for as long as the mapping lives
            stream.seek(size)
            text = stream.read()
            if int(text[-8:], 16) != zlib.crc32(text[:-8]):
                return None
            mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        return None
    content = json.loads(text[:-8])
    if content["format"] != FORMAT or tuple(content["shape"]) != shape:
        return None
    return torch.frombuffer(mapped, dtype=torch.uint8, count=size).view(shape), content, mapped


def _is_whole(pixels: Tensor, content: dict[str, Any]) -> bool:
    """Whether the checksums of this process's share of the blocks are right."""
    data = pixels.numpy()
    with ThreadPoolExecutor(cores()) as pool:
        mine = content["blocks"][rank() :: world()]
        return all(pool.map(lambda block: zlib.crc32(data[block[0] : block[1]].data) == block[2], mine))


def _build(images: ImageSet, file: Path, shape: tuple[int, ...]) -> None:
    token = broadcast_object(secrets.token_hex(8))
    partial = file.with_name(f"{file.name}.{token}.partial")
    with contextlib.ExitStack() as cleanup:
        lock = _together(lambda: _reserve(partial, shape) if rank() == 0 else None)[0]
        if rank() == 0 and lock is not None:
            cleanup.callback(_release, lock)
            cleanup.callback(partial.unlink, missing_ok=True)
        shares = _together(lambda: _write_share(images, partial, shape))
        content = {
            "format": FORMAT,
            "shape": shape,
            "blocks": [block for blocks, _ in shares for block in blocks],
            "unreadable": {i: said for _, unreadable in shares for i, said in unreadable.items()},
        }
        _together(lambda: _finish(partial, file, shape, content) if rank() == 0 else None)
    barrier()


def _together(action: Callable[[], T]) -> list[T]:
    """A step that every process must survive, so that none waits for one that has failed; the results of all."""
    result: list[T] = []
    try:
        result.append(action())
    finally:
        every = gather_objects(result)
    if not all(every):
        raise InvalidState(f"{_KEY}: another process could not do its share; its message says why.")
    return [share[0] for share in every]


def _reserve(partial: Path, shape: tuple[int, ...]) -> int:
    """A new and locked file of the size of the pixels; its descriptor."""
    with _writing(partial, shape):
        partial.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666)
            _lock(descriptor, wait=True)
            if os.path.lexists(partial):  # else another run took it for a leftover before it was locked
                break
            os.close(descriptor)
        try:
            os.truncate(descriptor, int(np.prod(shape)))
        except OSError:
            partial.unlink()
            _release(descriptor)
            raise
    return descriptor


def _write_share(
    images: ImageSet, partial: Path, shape: tuple[int, ...]
) -> tuple[list[tuple[int, int, int]], dict[int, list[str]]]:
    """Write the images of this process; its blocks with their checksums, and what could not be read."""
    first, end = (len(images) * r // world() for r in (rank(), rank() + 1))
    starts = range(first, end, BLOCK)
    batches = [range(i, min(i + BLOCK, end)) for i in starts]
    blocks: list[tuple[int, int, int]] = []
    unreadable: dict[int, list[str]] = {}
    try:
        descriptor = os.open(partial, os.O_RDWR | _NO_FOLLOW)
    except FileNotFoundError:
        raise InvalidState(
            f"{_KEY}: process {rank()} does not see {partial.parent}, where process 0 writes; the folder must be on a "
            f"file system that all processes share. Name one in DATALOADER.CACHE_DIR, or set DATALOADER.CACHE to host."
        ) from None
    with _writing(partial, shape), open(descriptor, "r+b") as stream:
        stream.seek(first * int(np.prod(shape[1:])))
        decoded = images.decode(batches, torch.device("cpu"))
        for batch, (pixels, errors) in zip(batches, progress(decoded, "fill cache", len(batches)), strict=True):
            data = pixels.numpy()
            stream.write(data.data)
            blocks.append((batch.start, batch.stop, zlib.crc32(data.data)))
            unreadable |= {i: _said(error) for i, error in errors.items()}
        stream.flush()
        os.fsync(stream.fileno())
    return blocks, unreadable


def _finish(partial: Path, file: Path, shape: tuple[int, ...], content: dict[str, Any]) -> None:
    with _writing(partial, shape):
        with open(os.open(partial, os.O_RDWR | _NO_FOLLOW), "r+b") as stream:
            stream.seek(0, os.SEEK_END)
            text = json.dumps(content).encode()
            stream.write(text + b"%08x" % zlib.crc32(text))
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(file)


@contextlib.contextmanager
def _writing(partial: Path, shape: tuple[int, ...]) -> Iterator[None]:
    """What goes wrong under it is told with the folder and the size."""
    try:
        yield
    except OSError as error:
        raise InvalidState(
            f"{_KEY}: {partial.parent} cannot take the {gib(shape)} of pixels ({error.strerror}); nothing is left "
            f"there. Free space, name another folder in DATALOADER.CACHE_DIR, or set DATALOADER.CACHE to none."
        ) from error


def _remove_outdated(folder: Path, outdated: re.Pattern[str], keep: str) -> None:
    """Remove what no run has locked: files that killed runs left unfinished, and caches of images as they were."""
    for file in folder.iterdir():
        leftover = file.name.startswith("pixels-") and file.name.endswith(".partial")
        if file.name == keep or not (leftover or outdated.fullmatch(file.name)):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDWR | _NO_FOLLOW)
            try:
                if _lock(descriptor):
                    file.unlink()
                    logger.info("%s: removed %s, which no run uses any more", _KEY, file)
            finally:
                _release(descriptor)


def _lock(descriptor: int, *, wait: bool = False, shared: bool = False) -> bool:
    """Lock an open file; False where another process has it, or where the file system knows no locks."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _release(descriptor: int) -> None:
    """Unlock and close; closing alone would leave the lock to worker processes that were started meanwhile."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _said(error: UserError) -> list[str]:
    return [error.cause, error.remedy] if isinstance(error, UnreadableImage) else []


def _error(path: str, *said: str) -> UserError:
    return UnreadableImage(path, *said) if said else MissingFile(f"{path}: there is no such file. Check the path.")
