"""Images by index, as uint8 tensors of one size."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastreid_uns.data.decode import UnreadableImage, read_pixels
from fastreid_uns.data.image_check import find_unreadable
from fastreid_uns.errors import InvalidState, MissingFile, UserError
from fastreid_uns.structures import Record


class ImageSet:
    """Images of a list of records, decoded in each pass by `decode.read_pixels`; knows no label.

    Args:
        records: one for each image; the position is the index of the image.
        size: height and width in pixels.
        workers: processes that decode; they start with the first stream and stay. 0 decodes in this process. The
            number changes the speed only.

    Attributes:
        records, paths: of the images, in order.
        cameras: (N,) int64, -1 unknown.
        size: as given.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (40, 80), "white").save("white.png")
        >>> images = ImageSet([Record("white.png", identity=-1, camera=0)], size=(8, 4))
        >>> images[0].shape, images[0].unique().tolist()
        (torch.Size([3, 8, 4]), [255])
    """

    def __init__(self, records: Sequence[Record], size: tuple[int, int], *, workers: int = 0) -> None:
        self.size = (int(size[0]), int(size[1]))
        self.workers = workers
        self._list(records)
        self._plan = _Plan()
        self._loader: DataLoader | None = None
        self._turn = 0

    def _list(self, records: Sequence[Record]) -> None:
        self.records = list(records)
        self.paths = [record.path for record in records]
        self.cameras = torch.tensor([record.camera for record in records], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Tensor:
        """One image, uint8 (3,H,W) on the CPU.

        Raises:
            FileNotFoundError: the file is missing.
            ValueError: the file is no readable image.
        """
        return torch.from_numpy(read_pixels(self.paths[index], self.size))

    def check(self) -> dict[int, UserError]:
        """Index and error of each image that cannot be read, in order. Processes share the work: all must call."""
        return find_unreadable(self.records)

    def keep(self, index: Sequence[int]) -> None:
        """Leave out all other images; from now on indices count those that are kept."""
        self._list([self.records[i] for i in index])
        self._loader = None

    def release(self) -> None:
        """Give back memory that is not needed before the images are read again; here there is none."""

    def stream(self, batches: Iterable[Sequence[int]], device: torch.device | str) -> Iterator[Tensor]:
        """For each list of B indices, in order, the images as uint8 (B,3,H,W) on `device`.

        Workers decode ahead. To CUDA the images go from pinned memory without waiting, while the device still works
        on what it was given before. A stream may be left before its end, but a set has only one at a time.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is no readable image.
            RuntimeError: this stream is read on after a later one has begun.
        """
        for pixels, errors in self.decode(batches, device):
            for error in errors.values():
                raise error
            yield pixels

    def decode(
        self, batches: Iterable[Sequence[int]], device: torch.device | str
    ) -> Iterator[tuple[Tensor, dict[int, UserError]]]:
        """As `stream`, with the errors of images that cannot be read, by index; their pixels are 0."""
        device = torch.device(device)
        self._turn += 1
        turn = self._turn
        self._plan.batches = batches
        pin = device.type == "cuda"
        if self._loader is None or self._loader.pin_memory != pin:
            self._loader = _loader(_Decoder(self.paths, self.size), self._plan, self.workers, pin)
            weakref.finalize(self, _release, self._loader)
        for pixels, errors in self._loader:
            yield pixels.to(device, non_blocking=pin), errors
            if turn != self._turn:
                raise InvalidState(
                    f"image set: stream {turn} is read on after stream {self._turn} has begun; a set gives one stream "
                    f"at a time. Finish the first, or make a second ImageSet."
                )


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

    def __getitem__(self, batch: Sequence[int]) -> tuple[Tensor, dict[int, UserError]]:
        pixels = np.zeros((len(batch), 3, *self.size), np.uint8)
        errors: dict[int, UserError] = {}
        for row, index in enumerate(batch):
            try:
                pixels[row] = read_pixels(self.paths[index], self.size)
            except (MissingFile, UnreadableImage) as error:
                errors[index] = error
        return torch.from_numpy(pixels), errors


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
