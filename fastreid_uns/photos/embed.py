"""Photos as several views each, what the first stages of a network make of these, and their pooled features."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastreid_uns.data.augment import Augment
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.engine.cpu_precision import faster_inference
from fastreid_uns.engine.solver import precision
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.modeling.backbones.base import feature_map
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.heads import PooledHead
from fastreid_uns.modeling.norm import folded_norms
from fastreid_uns.modeling.whitening import MainDirections, ViewWhitening
from fastreid_uns.photos.view_store import ViewStore
from fastreid_uns.utils.transfer import to_device

BATCH = 32  # photos that are read at a time
_PASS = 8  # images at a time on a CPU, whose caches hold them and their maps; on a GPU all of a batch
_ROWS = 1024  # photos that are whitened at a time
_LARGEST = 65504  # of float16
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


def views(
    images: ImageSet, number: int, seed: int, *, device: torch.device | str = "cpu", first: int = 0
) -> Iterator[tuple[slice, Tensor]]:
    """Each photo as it is and `number` - 1 views of it.

    The views of a photo follow from its pixels and the seed, so they are the same whatever other photos there are, and
    on another device but for rounding.

    Args:
        first: photo to begin with.

    Yields:
        Rows of the set, and their views (B, V, 3, H, W) float32 in 0..1, on the device.
    """
    augment = view_augment(images.size)
    starts = range(first, len(images), BATCH)
    batches = [range(start, min(start + BATCH, len(images))) for start in starts]
    for start, pixels in zip(starts, images.stream(batches, "cpu"), strict=True):
        placed = to_device(pixels, torch.device(device))
        made = placed[:, None].float() / 255
        if number > 1:
            drawn = [augment.sample_parameters(number - 1, images.size, _generator(photo, seed)) for photo in pixels]
            parameters = {name: torch.cat([one[name] for one in drawn]) for name in drawn[0]}
            copies = placed.repeat_interleave(number - 1, dim=0)
            others = torch.cat(
                [
                    augment(copies[few], {name: values[few] for name, values in parameters.items()})
                    for few in _passes(copies)
                ]
            )
            made = torch.cat([made, others.unflatten(0, (len(pixels), number - 1))], dim=1)
        yield slice(start, start + len(pixels)), made


def _generator(photo: Tensor, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(photo.numpy().tobytes(), seed))  # it takes 32 bits


def _passes(images: Tensor) -> list[slice]:
    """Rows that are worked on at a time."""
    size = _PASS if images.device.type == "cpu" else max(len(images), 1)
    return [slice(start, start + size) for start in range(0, len(images), size)]


class Fixed:
    """A part of a network whose weights do not change: norms folded, in the faster precision, few images at a time.

    Args:
        part: in evaluation mode.
        maps: (B, C, H, W) of what it gets, on its device, for trials.
        amp: `auto` takes bfloat16 on a GPU that computes in it, and on a CPU where the part is faster in it, by
            measurement; else a name that `solver.precision` accepts.
    """

    def __init__(self, part: nn.Module, maps: Tensor, amp: str) -> None:
        maps = _channels_last(maps)
        self.part = folded_norms(part, maps)
        measured = amp == "auto" and maps.device.type == "cpu"
        self.dtype = faster_inference(self.part, maps) if measured else precision(amp, maps.device)

    @torch.no_grad()
    def __call__(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) → (B, D, h, w) float32."""
        with torch.autocast(maps.device.type, self.dtype, enabled=self.dtype is not None):
            return torch.cat([feature_map(self.part(_channels_last(maps[few]))).float() for few in _passes(maps)])


@dataclass(frozen=True)
class Stages:
    """An encoder in two parts, on its device: what stays as it is, and what may be trained.

    Attributes:
        trunk: normalised images → activations.
        top: activations → feature map.
        head: feature map → pooled features; its whitening is fitted to the photos.
        amp: precision of what is not being trained, see `Fixed`.
    """

    encoder: Encoder
    trunk: Fixed
    top: nn.Module
    head: PooledHead
    amp: str

    @classmethod
    def of(cls, encoder: Encoder, size: tuple[int, int], *, trained: bool, amp: str = "none") -> Stages:
        """The parts of an encoder with a `PooledHead`.

        Args:
            size: height and width of the images in pixels.
            trained: the last two stages are to be trained; else all of the network is the trunk.
            amp: see `Fixed`.

        Raises:
            InvalidState: they cannot be told apart.
        """
        trunk, top = encoder.backbone.split() if trained else (encoder.backbone, nn.Identity())  # type: ignore[operator]
        encoder.eval().to(memory_format=torch.channels_last)  # half as long on the CPU
        images = torch.rand(_PASS, 3, *size, generator=torch.Generator().manual_seed(0)).to(encoder.mean.device)
        return cls(encoder, Fixed(trunk, images, amp), top, encoder.head, amp)  # type: ignore[arg-type]

    @property
    def device(self) -> torch.device:
        """That of the encoder."""
        return self.encoder.mean.device

    def activations(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 → what the trunk gives."""
        mean, std = self.encoder.mean, self.encoder.std
        return torch.cat([self.trunk((images[few] - mean) / std) for few in _passes(images)])

    def fixed_top(self, activations: Tensor) -> Fixed:
        """The top as it is now; some activations are for trials."""
        return Fixed(self.top, activations[:_PASS], self.amp)

    def trained_top(self, activations: Tensor) -> nn.Module:
        """The top as it is trained: its norms keep their statistics; some activations are for trials."""
        return folded_norms(self.top, _channels_last(activations[:_PASS]), trained=True)

    def pooled(self, activations: Tensor, top: nn.Module | Fixed | None = None) -> Tensor:
        """What the trunk gave → (B, P) before whitening; by the top itself, in float32, unless one is named."""
        return self.head((self.top if top is None else top)(_channels_last(activations))).pooled


def _channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def cache_activations(
    stages: Stages,
    images: ImageSet,
    number: int,
    seed: int,
    kept: ViewStore | None = None,
    told: Told = lambda done: None,
) -> ViewStore:
    """What the trunk gives for `number` views of each photo, in half precision; `told` counts views.

    Args:
        kept: where it goes; what is there already is not computed again.

    Memory: 2 * N * V * C * h * w bytes; EfficientNet-Lite0 at 224 pixels has 44 kB a view.
    """

    def compute(made: Tensor) -> Tensor:
        return stages.activations(made).clamp(-_LARGEST, _LARGEST).half()

    return _by_block(compute, stages.device, images, number, seed, kept, told)


@torch.no_grad()
def pooled_features(stages: Stages, kept: ViewStore, told: Told = lambda done: None) -> Tensor:
    """(N, V, P) float32 pooled features of activations, on the device; `told` counts views."""
    pooled = torch.empty(0)
    top = stages.fixed_top(kept.take(slice(0, _PASS)).flatten(0, 1))
    for start in range(0, len(kept), BATCH):
        rows = slice(start, min(start + BATCH, len(kept)))
        values = kept.take(rows)
        found = stages.pooled(values.flatten(0, 1), top).unflatten(0, values.shape[:2])
        pooled = pooled if len(pooled) else found.new_empty((len(kept), *found.shape[1:]))
        pooled[rows] = found
        told(values.shape[0] * values.shape[1])
    return pooled


def direct_features(
    stages: Stages,
    images: ImageSet,
    number: int,
    seed: int,
    kept: ViewStore | None = None,
    told: Told = lambda done: None,
) -> Tensor:
    """The same without keeping activations: (N, V, P) float32; `told` counts views, `kept` takes the features."""

    def compute(made: Tensor) -> Tensor:
        return stages.pooled(stages.activations(made))

    return _by_block(compute, stages.device, images, number, seed, kept, told).values.to(stages.device)


@torch.no_grad()
def _by_block(
    compute: Callable[[Tensor], Tensor],
    device: torch.device,
    images: ImageSet,
    number: int,
    seed: int,
    kept: ViewStore | None,
    told: Told,
) -> ViewStore:
    """What `compute` gives for the views of each photo, (B * V, 3, H, W), block by block."""
    if len(images) == 0:
        raise InvalidValue("photos: there is none; at least one is needed. Name another folder.")
    kept = ViewStore() if kept is None else kept
    kept.device = device
    for rows, made in views(images, number, seed, device=device, first=kept.done):
        found = compute(made.flatten(0, 1)).unflatten(0, made.shape[:2])
        kept.begin((len(images), number, *found.shape[2:]), found.dtype)
        kept.put(rows, found)
        told(made.shape[0] * made.shape[1])
    images.release()
    return kept


def whitened(head: PooledHead, pooled: Tensor) -> Tensor:
    """(N, V, P) pooled features of views → (N, D) features of photos, unit length, by the whitening of the head.

    Photos that the whitening cannot tell from their mean, as equal ones, all get the same feature.
    """
    whitening = whitening_of(head)
    return _unit_length(torch.cat([whitening(rows.mean(1)) for rows in pooled.split(_ROWS)]))


def whitened_along(head: PooledHead, found: MainDirections) -> Tensor:
    """What `whitened` gives for the features whose directions these are, but for rounding, without reading them again.

    The whitening must be fitted to the same directions.
    """
    matrix = found.directions.T @ whitening_of(head).projection.double()
    return _unit_length((found.views.mean(1).double() @ matrix).float())


def _unit_length(found: Tensor) -> Tensor:
    length = found.norm(dim=1, keepdim=True)
    first = torch.eye(1, found.shape[1], device=found.device)
    return torch.where(length > 1e-6, found / length.clamp(min=1e-6), first)


def whitening_of(head: PooledHead) -> ViewWhitening:
    """The whitening of a head.

    Raises:
        InvalidState: it has none.
    """
    if head.whitening is None:
        raise InvalidState("photos: MODEL.HEAD has no whitening; DIM above 0 is needed. Set it, for example to 192.")
    return head.whitening
