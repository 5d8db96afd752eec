"""What a network gave for the views of photos, kept while it is needed; in a file it outlives an interruption."""

from __future__ import annotations

import copy
import json
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fastreid_uns.errors import InvalidState
from fastreid_uns.photos.files import own_folder
from fastreid_uns.utils.memory import drop_pages
from fastreid_uns.utils.transfer import to_device

_HEAD = 4096  # bytes of a file before its rows: how many are there, then JSON
_SHARE = 0.5  # of the free memory of a GPU that rows may take; the rest is for the network
_KINDS = {"float16": torch.float16, "float32": torch.float32}


class ViewStore:
    """One row for each photo, filled from the first photo to the last.

    On a GPU the rows stay on it if half of its free memory holds them, and end with the process. Otherwise they are in
    memory, or, if a file is named, in that.

    Args:
        file: which goes on from the last block of an earlier process; None for none.
        mark: fingerprint of all that the rows depend on; a file with another one is begun anew.

    Attributes:
        done: photos whose rows are there.
        values: (N, V, ...) float16 or float32; empty before `begin`.
        device: where rows are computed, and wanted when they are taken.
    """

    def __init__(self, file: Path | None = None, mark: str = "") -> None:
        self.file, self.mark = file, mark
        self.done, self.values, self.device = 0, torch.empty(0, 0), torch.device("cpu")
        self._mapped: mmap.mmap | None = None  # of the whole file
        if file is not None:
            self._go_on(file)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def number(self) -> int:
        """V."""
        return self.values.shape[1]

    def begin(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Make room, if no earlier process has.

        Raises:
            InvalidState: the disk has too little space.
        """
        if len(self):
            return
        near = on_device(math.prod(shape) * dtype.itemsize, self.device)
        if near or self.file is None:
            self.values = torch.empty(tuple(shape), dtype=dtype, device=self.device if near else "cpu")
        else:
            self._make(self.file, shape, dtype)

    def put(self, rows: slice, found: Tensor) -> None:
        """Keep the next rows."""
        self.values[rows] = found.to(self.values.device, self.values.dtype)
        self.done = rows.stop
        if self._mapped is not None:
            self._mapped.flush()  # rows first: after a power cut none is missing that the file says is there
            self._mapped[:8] = self.done.to_bytes(8, "little")
            self._mapped.flush(0, _HEAD)
            self.release()

    def take(self, photos: slice | Tensor, chosen: Tensor | None = None) -> Tensor:
        """float32 of some photos: (B, V, ...), or (B, n, ...) of the (B, n) chosen views."""
        place = self.values.device
        rows = photos if isinstance(photos, slice) else photos.to(place)
        found = self.values[rows] if chosen is None else self.values[rows[:, None], chosen.to(place)]  # type: ignore[index]
        return to_device(found, self.device).float()

    def part(self, photos: Tensor) -> ViewStore:
        """A store of some photos, in memory."""
        part = copy.copy(self)
        part.values, part.done = self.values[photos.to(self.values.device)], len(photos)
        part.file = part._mapped = None
        return part

    def release(self) -> None:
        """Give back the memory of rows that are in a file; what is taken again is read from it."""
        if self._mapped is not None:
            drop_pages(self._mapped)

    def remove(self) -> None:
        """Delete the file; the rows are there as long as this object."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _go_on(self, file: Path) -> None:
        try:
            with os.fdopen(os.open(file, os.O_RDWR | os.O_NOFOLLOW), "r+b") as stream:
                head = stream.read(_HEAD)
                said = json.loads(head[8:])
                size = _HEAD + math.prod(said["shape"]) * _KINDS[said["dtype"]].itemsize
                if said["mark"] == self.mark and os.fstat(stream.fileno()).st_size == size:
                    self._map(stream, said["shape"], said["dtype"])
                    self.done = int.from_bytes(head[:8], "little")
        except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
            return

    def _make(self, file: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
        name = next(name for name, kind in _KINDS.items() if kind == dtype)
        said = json.dumps({"mark": self.mark, "shape": list(shape), "dtype": name}).encode()
        size = _HEAD + math.prod(shape) * dtype.itemsize
        try:
            own_folder(file.parent)
            file.unlink(missing_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
            with os.fdopen(descriptor, "r+b") as stream:
                _reserve(stream, size)
                stream.write((bytes(8) + said).ljust(_HEAD))
                stream.flush()
                self._map(stream, shape, name)
        except OSError as error:
            file.unlink(missing_ok=True)
            raise InvalidState(
                f"{file.parent}: {size / 1e9:.1f} GB are needed there while photos are grouped ({error.strerror}). "
                f"Free some space, choose another output folder, or group without training."
            ) from error

    def _map(self, stream: BinaryIO, shape: Sequence[int], dtype: str) -> None:
        self._mapped = mmap.mmap(stream.fileno(), 0)
        self.values = torch.frombuffer(self._mapped, dtype=_KINDS[dtype], offset=_HEAD).view(*shape)


def on_device(size: int, device: torch.device) -> bool:
    """Whether so many bytes are kept on a device."""
    return device.type == "cuda" and size <= _SHARE * torch.cuda.mem_get_info(device)[0]


def _reserve(stream: BinaryIO, size: int) -> None:
    """Take the space of a file: a mapping would end the process where the disk is full."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(stream.fileno(), 0, size)
    else:
        stream.truncate(size)
