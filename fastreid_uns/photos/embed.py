"""Photos as several views each, what the first stages of a network make of these, and their pooled features."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastreid_uns.data.augment import Augment
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.modeling.backbones.base import feature_map
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.heads import PooledHead
from fastreid_uns.modeling.whitening import ViewWhitening

BATCH = 32  # photos that are read at a time
_PASS = 16  # images that go through the trunk at a time
IN_MEMORY = 2**30  # bytes of activations above which they go to a file
_ASPECT = 0.85  # smallest width / height of a crop, with that of the photo as 1

Told = Callable[[float], None]  # takes how many units of work are done since the last call


def view_augment(size: tuple[int, int]) -> Augment:
    """What makes another view of a photo: a turn of up to 8 degrees, a crop of 60 to 100 %, colors changed by 30 %.

    Never a mirror image: the left and the right side of an animal differ.
    """
    aspect = size[1] / size[0]
    return Augment(
        flip=0,
        pad=0,
        erase=0,
        rotation=8,
        resized_crop=(0.6, 1),
        resized_crop_aspect=(_ASPECT * aspect, aspect / _ASPECT),
        jitter=1,
        brightness=0.3,
        contrast=0.3,
        saturation=0.3,
    )


def views(images: ImageSet, number: int, seed: int) -> Iterator[tuple[slice, Tensor]]:
    """Each photo as it is and `number` - 1 views of it.

    The views of a photo follow from its pixels and the seed, so they are the same whatever other photos there are.

    Yields:
        Rows of the set, and their views (B, V, 3, H, W) float32 in 0..1, on the CPU.
    """
    augment = view_augment(images.size)
    starts = range(0, len(images), BATCH)
    batches = [range(start, min(start + BATCH, len(images))) for start in starts]
    for start, pixels in zip(starts, images.stream(batches, "cpu"), strict=True):
        made = pixels[:, None].float() / 255
        if number > 1:
            drawn = [augment.sample_parameters(number - 1, images.size, _generator(photo, seed)) for photo in pixels]
            parameters = {name: torch.cat([one[name] for one in drawn]) for name in drawn[0]}
            others = augment(pixels.repeat_interleave(number - 1, dim=0), parameters)
            made = torch.cat([made, others.unflatten(0, (len(pixels), number - 1))], dim=1)
        yield slice(start, start + len(pixels)), made


def _generator(photo: Tensor, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(photo.numpy().tobytes(), seed))  # it takes 32 bits


@dataclass(frozen=True)
class Stages:
    """An encoder in two parts: what stays as it is, and what may be trained.

    Attributes:
        trunk: normalised images → activations.
        top: activations → feature map.
        head: feature map → pooled features; its whitening is fitted to the photos.
        amp: precision of the trunk, None for float32.
    """

    encoder: Encoder
    trunk: nn.Module
    top: nn.Module
    head: PooledHead
    amp: torch.dtype | None = None

    @classmethod
    def of(cls, encoder: Encoder, *, trained: bool, amp: torch.dtype | None = None) -> Stages:
        """The parts of an encoder with a `PooledHead`.

        Args:
            trained: the last two stages are to be trained; else all of the network is the trunk.
            amp: bfloat16 computes the trunk under autocast; None in full precision.

        Raises:
            InvalidState: they cannot be told apart.
        """
        trunk, top = encoder.backbone.split() if trained else (encoder.backbone, nn.Identity())  # type: ignore[operator]
        encoder.eval().to(memory_format=torch.channels_last)  # half as long on the CPU
        return cls(encoder, trunk, top, encoder.head, amp)  # type: ignore[arg-type]

    def activations(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 → what the trunk gives; a few images at a time, whose maps fit into memory."""
        parts = ((part - self.encoder.mean) / self.encoder.std for part in images.split(_PASS))
        with torch.autocast("cpu", self.amp, enabled=self.amp is not None):
            return torch.cat([feature_map(self.trunk(_channels_last(part))).float() for part in parts])

    def pooled(self, activations: Tensor) -> Tensor:
        """What the trunk gave → (B, 2C), without whitening."""
        return self.head(self.top(_channels_last(activations))).pooled


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


class Activations:
    """What the trunk gave for all views of all photos, in half precision: in memory, or in a file if it is large.

    Args:
        photos, number: N and V.
        shape: (C, h, w) of one view.
        folder: of the file, which ends with this object; None = the system's folder for such files.

    Memory: 2 * N * V * C * h * w bytes; EfficientNet-Lite0 at 224 pixels has 44 kB a view.
    """

    def __init__(self, photos: int, number: int, shape: torch.Size, folder: Path | None = None) -> None:
        whole = (photos, number, *shape)
        if 2 * np.prod(whole, dtype=np.int64) <= IN_MEMORY:
            self.values: np.ndarray = np.empty(whole, np.float16)
        else:
            with tempfile.TemporaryFile(dir=folder) as file:  # the mapping keeps it
                _reserve(file.fileno(), 2 * int(np.prod(whole, dtype=np.int64)), folder)
                self.values = np.memmap(file, np.float16, "w+", shape=whole)

    def put(self, rows: slice, values: Tensor) -> None:
        """Keep (B, V, C, h, w) as those of some photos."""
        self.values[rows] = values.clamp(-65504, 65504).to(torch.float16).numpy()

    def take(self, photos: slice | Tensor, chosen: Tensor | None = None) -> Tensor:
        """float32 activations of some photos: (B, V, C, h, w), or (B, n, C, h, w) of the (B, n) chosen views."""
        rows = photos if isinstance(photos, slice) else photos.numpy()
        found = self.values[rows]
        if chosen is not None:
            found = found[np.arange(len(found))[:, None], chosen.numpy()]
        return torch.from_numpy(found.astype(np.float32))

    def __len__(self) -> int:
        return len(self.values)

    @property
    def number(self) -> int:
        """V."""
        return self.values.shape[1]


def _reserve(descriptor: int, size: int, folder: Path | None) -> None:
    """Take the space of a file: a mapping would end the process where the disk is full.

    Raises:
        InvalidState: there is too little.
    """
    if not hasattr(os, "posix_fallocate"):  # no POSIX
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        raise InvalidState(
            f"{folder or tempfile.gettempdir()}: {size / 1e9:.1f} GB are needed there while photos are grouped "
            f"({error.strerror}). Free some space, choose another output folder, or group without training."
        ) from error


@torch.no_grad()
def cache_activations(
    stages: Stages, images: ImageSet, number: int, seed: int, folder: Path | None = None, told: Told = lambda done: None
) -> Activations:
    """What the trunk gives for `number` views of each photo; `told` counts views."""
    kept: Activations | None = None
    for rows, made in views(images, number, seed):
        found = stages.activations(made.flatten(0, 1)).unflatten(0, made.shape[:2])
        if kept is None:
            kept = Activations(len(images), number, found.shape[2:], folder)
        kept.put(rows, found)
        told(made.shape[0] * made.shape[1])
    if kept is None:
        raise _no_photo()
    return kept


@torch.no_grad()
def pooled_features(stages: Stages, kept: Activations, told: Told = lambda done: None) -> Tensor:
    """(N, V, 2C) float32 pooled features of activations; `told` counts views."""
    parts = []
    for start in range(0, len(kept), BATCH):
        values = kept.take(slice(start, start + BATCH))
        parts.append(stages.pooled(values.flatten(0, 1)).unflatten(0, values.shape[:2]))
        told(values.shape[0] * values.shape[1])
    return torch.cat(parts)


@torch.no_grad()
def direct_features(stages: Stages, images: ImageSet, number: int, seed: int, told: Told = lambda done: None) -> Tensor:
    """The same without keeping activations: (N, V, 2C) float32; `told` counts views."""
    parts = []
    for _, made in views(images, number, seed):
        found = stages.pooled(stages.activations(made.flatten(0, 1)))
        parts.append(found.unflatten(0, made.shape[:2]))
        told(made.shape[0] * made.shape[1])
    if not parts:
        raise _no_photo()
    return torch.cat(parts)


def _no_photo() -> InvalidValue:
    """What is raised for an empty set."""
    return InvalidValue("photos: there is none; at least one is needed. Name another folder.")


def whitened(head: PooledHead, pooled: Tensor) -> Tensor:
    """(N, V, 2C) pooled features of views → (N, D) features of photos, unit length, by the whitening of the head.

    Photos that the whitening cannot tell from their mean, as equal ones, all get the same feature.
    """
    found = whitening_of(head)(pooled.mean(1))
    length = found.norm(dim=1, keepdim=True)
    first = torch.eye(1, found.shape[1])
    return torch.where(length > 1e-6, found / length.clamp(min=1e-6), first)


def whitening_of(head: PooledHead) -> ViewWhitening:
    """The whitening of a head.

    Raises:
        InvalidState: it has none.
    """
    if head.whitening is None:
        raise InvalidState("photos: MODEL.HEAD has no whitening; DIM above 0 is needed. Set it, for example to 192.")
    return head.whitening
