"""Images that are decoded once and held: on the device, in memory, or in a file."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastreid_uns.data.image_check import united
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.pixel_file import BLOCK, gib, map_pixels
from fastreid_uns.errors import InvalidState, InvalidValue, UserError
from fastreid_uns.utils.memory import drop_pages
from fastreid_uns.utils.progress import progress
from fastreid_uns.utils.transfer import to_device

PLACES = ("none", "device", "host", "disk")  # of DATALOADER.CACHE


class CachedImageSet(ImageSet):
    """The same images, each of them decoded once.

    On the device and in memory an image is held from its first use on, so that a process which needs a share of the
    images decodes this share alone; `check` reads all. A file is complete from the start, see `pixel_file`.

    Args:
        images: where the pixels come from.
        where: `device` keeps the pixels on `device` (fastest), `host` in the memory of each process, `disk` in one
            file that all processes map and that later runs use again.
        device: of `where="device"`.
        folder: of `where="disk"`, seen by all processes.
        what: the images are to the run, such as `DATASETS.TRAIN`; of `where="disk"`.

    Attributes:
        pixels: uint8 (N,3,H,W), that is N * 3 * H * W bytes.

    Raises:
        ValueError: no images, unknown `where`, or `disk` without a folder.
        RuntimeError: the pixels fit neither in memory nor on the disk.
    """

    def __init__(
        self,
        images: ImageSet,
        *,
        where: str = "host",
        device: torch.device | str = "cpu",
        folder: str | Path = "",
        what: str = "images",
    ) -> None:
        if where not in PLACES[1:]:
            raise InvalidValue(f"DATALOADER.CACHE: {where!r} is unknown; accepted: {', '.join(PLACES)}. Choose one.")
        if where == "disk" and not str(folder):
            raise InvalidValue("DATALOADER.CACHE disk: no folder is given; name one for the file of pixels.")
        if len(images) == 0:
            raise InvalidValue(f"{what}: the set has no images; nothing can be cached. Check its root.")
        self.size, self.workers = images.size, 0
        self._list(images.records)
        self._errors: dict[int, UserError] = {}
        self._source: ImageSet | None = None  # of what is not held yet
        self._held = torch.ones(len(images), dtype=torch.bool)
        self._rows: Tensor | None = None  # of `pixels` for each index, once images have been left out
        self._mapping: mmap.mmap | None = None
        if where == "disk":
            self.pixels, self._errors, self._mapping = map_pixels(images, Path(folder), what)
        else:
            self.pixels = _allocate(images, where, torch.device(device if where == "device" else "cpu"))
            self._source = images
            self._held.zero_()

    def __getitem__(self, index: int) -> Tensor:
        """One image, uint8 (3,H,W) on the CPU."""
        (pixels,) = self.stream([[index]], "cpu")
        return pixels[0]

    def check(self) -> dict[int, UserError]:
        """See `ImageSet.check`: every image is decoded and held."""
        if self._source is not None:
            batches = [range(i, min(i + BLOCK, len(self))) for i in range(0, len(self), BLOCK)]
            for _ in progress(self._ready(self._source, batches), "fill cache", total=len(batches)):
                pass
        return united(self._errors)

    def keep(self, index: Sequence[int]) -> None:
        """See `ImageSet.keep`; the pixels of the others stay where they are, unused."""
        if self._source is not None:
            raise InvalidState("image cache: images are left out after check() has read all of them. Call it first.")
        chosen = torch.as_tensor(index, dtype=torch.int64)
        self._rows = chosen if self._rows is None else self._rows[chosen]
        self._errors = {new: self._errors[old] for new, old in enumerate(index) if old in self._errors}
        self._list([self.records[i] for i in index])

    def release(self) -> None:
        """See `ImageSet.release`: what is mapped from a file takes no memory until it is read again."""
        if self._mapping is not None:
            drop_pages(self._mapping)

    def stream(self, batches: Iterable[Sequence[int]], device: torch.device | str) -> Iterator[Tensor]:
        """See `ImageSet.stream`."""
        device = torch.device(device)
        for batch in batches if self._source is None else self._ready(self._source, batches):
            if self._errors:
                for error in (self._errors[i] for i in batch if i in self._errors):
                    raise error
            yield self._gather(torch.as_tensor(batch, dtype=torch.int64), device)

    def decode(
        self, batches: Iterable[Sequence[int]], device: torch.device | str
    ) -> Iterator[tuple[Tensor, dict[int, UserError]]]:
        """See `ImageSet.decode`."""
        device = torch.device(device)
        for batch in batches if self._source is None else self._ready(self._source, batches):
            errors = {i: self._errors[i] for i in batch if i in self._errors}
            yield self._gather(torch.as_tensor(batch, dtype=torch.int64), device), errors

    def _ready(self, source: ImageSet, batches: Iterable[Sequence[int]]) -> Iterator[Sequence[int]]:
        """The batches, each as soon as all of its images are held; they are decoded ahead."""
        batches = list(batches)
        missing = self._missing(batches)
        decoded = source.decode([new for new in missing if new], self.pixels.device) if any(missing) else iter(())
        for batch, new in zip(batches, missing, strict=True):
            if new:
                pixels, errors = next(decoded)
                index = torch.tensor(new)
                self.pixels.index_copy_(0, to_device(index, self.pixels.device), pixels)
                self._held[index] = True
                self._errors |= errors
            yield batch
        if bool(self._held.all()):
            self._source = None

    def _missing(self, batches: Sequence[Sequence[int]]) -> list[list[int]]:
        """For each batch the images that neither are held nor come with an earlier batch."""
        held = self._held.tolist()
        missing = []
        for batch in batches:
            missing.append([i for i in dict.fromkeys(batch) if not held[i]])
            for i in missing[-1]:
                held[i] = True
        return missing

    def _gather(self, index: Tensor, device: torch.device) -> Tensor:
        rows = index if self._rows is None else self._rows[index]
        if self.pixels.device.type != "cpu":
            return self.pixels.index_select(0, to_device(rows, self.pixels.device)).to(device)
        out = torch.empty((len(rows), *self.pixels.shape[1:]), dtype=torch.uint8, pin_memory=device.type == "cuda")
        return torch.index_select(self.pixels, 0, rows, out=out).to(device, non_blocking=True)


def _allocate(images: ImageSet, where: str, device: torch.device) -> Tensor:
    shape = (len(images), 3, *images.size)
    try:
        return torch.empty(shape, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # out of memory, on either kind of device
        other = "host or disk" if where == "device" else "disk"
        raise InvalidState(
            f"DATALOADER.CACHE {where}: {len(images):,} images need {gib(shape)}, which {device} does not have free. "
            f"Set DATALOADER.CACHE to {other}, or to none."
        ) from error
