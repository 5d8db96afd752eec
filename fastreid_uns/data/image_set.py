"""Images by index, as uint8 tensors of one size: decoded when asked for, or held in a cache."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastreid_uns.data.decode import read_pixels, why_unreadable
from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile, UserError
from fastreid_uns.structures import Record
from fastreid_uns.utils.comm import barrier, broadcast_object, gather_objects, rank, world
from fastreid_uns.utils.paths import path_manager, printable
from fastreid_uns.utils.progress import progress

logger = logging.getLogger(__name__)

PLACES = ("device", "host", "disk")
_CACHE_FORMAT = 2  # raise it when equal files would give other pixels
_BUILD_BATCH = 256


class ImageSet:
    """Images of a list of records, decoded in each pass; knows no label.

    `decode.read_pixels` decodes and resizes them.

    Args:
        records: one for each image; the position is the index of the image.
        size: height and width in pixels.
        workers: processes that decode; they start with the first stream and stay. 0 decodes in this process. The
            number changes the speed only.

    Attributes:
        paths: of the images, in order.
        cameras: (N,) int64, -1 unknown.
        size: as given.
    """

    def __init__(self, records: Sequence[Record], size: tuple[int, int], *, workers: int = 0) -> None:
        self.paths = [record.path for record in records]
        self.cameras = torch.tensor([record.camera for record in records], dtype=torch.int64)
        self.size = (int(size[0]), int(size[1]))
        self.workers = workers
        self._plan = _Plan()
        self._loader: DataLoader | None = None
        self._turn = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        """One image, uint8 (3,H,W) on the CPU.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: the file is no readable image.
        """
        return torch.from_numpy(read_pixels(self.paths[index], self.size))

    def stream(self, batches: Iterable[Sequence[int]], device: torch.device | str) -> Iterator[Tensor]:
        """For each list of B indices, in order, the images as uint8 (B,3,H,W) on `device`.

        Workers decode ahead. To CUDA the images go from pinned memory without waiting, while the device still works
        on what it was given before. A stream may be left before its end, but a set has only one at a time.

        Raises:
            FileNotFoundError: a file is missing; from a worker as well.
            ValueError: a file is no readable image; likewise.
            RuntimeError: this stream is read on after a later one has begun.
        """
        device = torch.device(device)
        self._turn += 1
        turn = self._turn
        self._plan.batches = batches
        pin = device.type == "cuda"
        if self._loader is None or self._loader.pin_memory != pin:
            self._loader = _loader(_Decoder(self.paths, self.size), self._plan, self.workers, pin)
            weakref.finalize(self, _release, self._loader)
        for pixels in self._loader:
            if isinstance(pixels, UserError):
                raise pixels
            yield pixels.to(device, non_blocking=pin)
            if turn != self._turn:
                raise InvalidState(
                    f"image set: stream {turn} is read on after stream {self._turn} has begun; a set gives one stream "
                    f"at a time. Finish the first, or make a second ImageSet."
                )


class CachedImageSet(ImageSet):
    """The same images, decoded once.

    Args:
        images: where the pixels come from; one pass over it fills the cache.
        where: `device` keeps the pixels on `device` (fastest), `host` in the memory of each process, `disk` in one
            file that all processes map and that later runs use again.
        device: of `where="device"`.
        folder: of `where="disk"`, seen by all processes. The file is named after a fingerprint of paths, sizes and
            modification times, so that changed images get a file of their own; it appears complete or not at all.

    Attributes:
        pixels: uint8 (N,3,H,W), that is N * 3 * H * W bytes.

    Raises:
        ValueError: no images, unknown `where`, `disk` without a folder, or an unreadable image.
        FileNotFoundError: an image is missing.
        RuntimeError: the pixels fit neither in memory nor on the disk.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        where: str = "host",
        device: torch.device | str = "cpu",
        folder: str | Path = "",
    ) -> None:
        if where not in PLACES:
            raise InvalidValue(f"DATALOADER.CACHE: {where!r} is unknown; accepted: {', '.join(PLACES)}.")
        if where == "disk" and not str(folder):
            raise InvalidValue("DATALOADER.CACHE disk: no folder is given; name one for the file of pixels.")
        if len(images) == 0:
            raise InvalidValue("DATALOADER.FEED cached: the set has no images; nothing can be cached. Check its root.")
        self.paths, self.cameras, self.size, self.workers = images.paths, images.cameras, images.size, 0
        if where == "disk":
            self.pixels = _mapped(images, Path(folder))
        else:
            self.pixels = _filled(images, where, torch.device(device if where == "device" else "cpu"))

    def __getitem__(self, index: int) -> Tensor:
        """One image, uint8 (3,H,W) on the CPU."""
        return self.pixels[index].cpu()

    def stream(self, batches: Iterable[Sequence[int]], device: torch.device | str) -> Iterator[Tensor]:
        """For each list of B indices, in order, the images as uint8 (B,3,H,W) on `device`."""
        device = torch.device(device)
        for batch in batches:
            index = torch.as_tensor(batch, dtype=torch.int64)
            if self.pixels.device.type == "cpu":
                out = torch.empty(
                    (len(index), *self.pixels.shape[1:]), dtype=torch.uint8, pin_memory=device.type == "cuda"
                )
                yield torch.index_select(self.pixels, 0, index, out=out).to(device, non_blocking=True)
            else:
                yield self.pixels.index_select(0, to_device(index, self.pixels.device)).to(device)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on another device; to CUDA through pinned memory, so that the host does not wait."""
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def unreadable_images(records: Sequence[Record], threads: int) -> list[tuple[str, str]]:
    """Path and reason of each image that cannot be decoded to its last row, in order.

    Args:
        records: images to read in full; nothing is kept.
        threads: that decode at the same time.
    """
    with ThreadPoolExecutor(threads) as pool:
        paths = [record.path for record in records]
        reasons = progress(pool.map(why_unreadable, paths), "check images", total=len(paths))
        return [(path, reason) for path, reason in zip(paths, reasons, strict=True) if reason]


def check_images(records: Sequence[Record], *, on_bad: str, what: str) -> list[Record]:
    """The records whose images can be read. Several processes share the work; all must call.

    Args:
        records: images to read in full.
        on_bad: `stop` raises if one is unreadable, `skip` leaves them out with a warning.
        what: the set, as it stands in messages.

    Raises:
        ValueError: unreadable images under `stop`, or an unknown `on_bad`.
    """
    if on_bad not in ("stop", "skip"):
        raise InvalidValue(f"INPUT.ON_BAD_IMAGE: {on_bad!r} is unknown; accepted: stop, skip.")
    mine = unreadable_images(records[rank() :: world()], threads=os.cpu_count() or 1)
    bad = dict(sorted(pair for share in gather_objects(mine) for pair in share))
    if not bad:
        return list(records)
    first = "; ".join(f"{printable(path)} ({printable(reason)})" for path, reason in list(bad.items())[:3])
    found = f"{what}: {len(bad):,} of {len(records):,} images cannot be read, the first: {first}."
    if on_bad == "stop":
        raise InvalidValue(
            f"{found} All must be readable. tools/prepare_data.py lists them; replace them, or leave them out with "
            f"INPUT.ON_BAD_IMAGE: skip."
        )
    if rank() == 0:
        logger.warning("%s They are left out; INPUT.ON_BAD_IMAGE: stop makes this an error.", found)
    return [record for record in records if record.path not in bad]


class _Plan:
    """The sampler of a loader that lives longer than one pass: what it iterates over can be exchanged."""

    batches: Iterable[Sequence[int]] = ()

    def __iter__(self) -> Iterator[Sequence[int]]:
        return iter(self.batches)


class _Decoder(Dataset):
    """What a worker process holds: paths, and how to turn a list of indices into a batch."""

    def __init__(self, paths: list[str], size: tuple[int, int]) -> None:
        self.paths = paths
        self.size = size

    def __getitem__(self, batch: Sequence[int]) -> Tensor | UserError:
        pixels = np.empty((len(batch), 3, *self.size), np.uint8)
        for row, index in enumerate(batch):
            try:
                pixels[row] = read_pixels(self.paths[index], self.size)
            except UserError as error:  # raised in a worker, it would lose its kind and its message
                return error
        return torch.from_numpy(pixels)


def _loader(decoder: _Decoder, plan: _Plan, workers: int, pin: bool) -> DataLoader:
    return DataLoader(
        decoder,
        batch_size=None,  # the plan gives whole batches
        sampler=plan,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin,
        generator=torch.Generator(),  # else the loader draws from the global one, which resumed runs would notice
    )


def _release(loader: DataLoader) -> None:
    """Held by the finalizer of a set, a loader is never part of a garbage cycle: within one, the queues of its workers
    would be closed before it can tell them to end, and torch would wait five seconds for each."""


def _decoded(images: ImageSet, first: int, end: int, device: torch.device) -> Iterator[Tensor]:
    batches = [range(i, min(i + _BUILD_BATCH, end)) for i in range(first, end, _BUILD_BATCH)]
    return iter(progress(images.stream(batches, device), "fill cache", total=len(batches)))


def _filled(images: ImageSet, where: str, device: torch.device) -> Tensor:
    shape = (len(images), 3, *images.size)
    try:
        pixels = torch.empty(shape, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # out of memory, on either kind of device
        other = "host or disk" if where == "device" else "disk"
        raise InvalidState(
            f"DATALOADER.CACHE {where}: {len(images):,} images need {_gib(shape)}, which {device} does not have free. "
            f"Set DATALOADER.CACHE to {other}, or DATALOADER.FEED to loader."
        ) from error
    row = 0
    for batch in _decoded(images, 0, len(images), device):
        pixels[row : row + len(batch)] = batch
        row += len(batch)
    return pixels


def _mapped(images: ImageSet, folder: Path) -> Tensor:
    shape = (len(images), 3, *images.size)
    size = int(np.prod(shape))
    file = folder / f"pixels-{images.size[0]}x{images.size[1]}-{_fingerprint(images)}.bin"
    exists, maker = broadcast_object((file.is_file() and file.stat().st_size == size, uuid.uuid4().hex))
    if exists:
        logger.info("Pixels of %s images from %s", f"{len(images):,}", file)
    else:
        partial = file.with_suffix(f".{maker}.partial")
        try:
            _together(lambda: _reserve(partial, shape))
            _together(lambda: _write_share(images, partial, shape))
            if rank() == 0:
                partial.replace(file)
        finally:
            if rank() == 0:
                partial.unlink(missing_ok=True)
        barrier()
    return torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8).view(shape)


def _together(action: Callable[[], None]) -> None:
    """Run a step that every process must survive, so that none waits for one that has failed."""
    done = False
    try:
        action()
        done = True
    finally:
        all_done = all(gather_objects(done))
    if not all_done:
        raise InvalidState("DATALOADER.CACHE disk: another process could not write its share; its message says why.")


def _reserve(partial: Path, shape: tuple[int, ...]) -> None:
    if rank() > 0:
        return
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            file.truncate(int(np.prod(shape)))
    except OSError as error:
        raise _unwritable(partial, shape, error) from error


def _write_share(images: ImageSet, partial: Path, shape: tuple[int, ...]) -> None:
    if not partial.is_file():
        raise InvalidState(
            f"DATALOADER.CACHE disk: process {rank()} does not see {partial.parent}, where process 0 writes; the "
            f"folder must lie on a file system that all processes share. Set DATALOADER.CACHE to host otherwise."
        )
    first, end = (len(images) * r // world() for r in (rank(), rank() + 1))
    try:
        with partial.open("r+b") as file:
            file.seek(first * int(np.prod(shape[1:])))
            for batch in _decoded(images, first, end, torch.device("cpu")):
                file.write(batch.numpy().data)
            file.flush()
            os.fsync(file.fileno())
    except FileNotFoundError:  # an image
        raise
    except OSError as error:
        raise _unwritable(partial, shape, error) from error


def _unwritable(partial: Path, shape: tuple[int, ...], error: OSError) -> RuntimeError:
    return RuntimeError(
        f"DATALOADER.CACHE disk: {partial.parent} cannot take the {_gib(shape)} of pixels ({error.strerror}); nothing "
        f"is left there. Free space or name another folder, or set DATALOADER.FEED to loader."
    )


def _gib(shape: tuple[int, ...]) -> str:
    return f"{np.prod(shape, dtype=float) / 2**30:.2f} GiB"


def _fingerprint(images: ImageSet) -> str:
    digest = hashlib.sha256(f"{_CACHE_FORMAT} {images.size}".encode())
    for path in images.paths:
        try:
            stat = os.stat(path_manager.get_local_path(path))
        except FileNotFoundError:
            raise MissingFile(f"{printable(path)}: there is no such file. Check the path.") from None
        digest.update(f"\n{path}\0{stat.st_size}\0{stat.st_mtime_ns}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]
