"""Images as another camera would show them: generated pictures from a folder, or the colours of that camera."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from os.path import basename, join, splitext

import torch
from torch import Tensor

from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.train_set import TrainSet
from fastreid_uns.errors import InvalidValue, MissingFile
from fastreid_uns.structures import Record
from fastreid_uns.utils.comm import gather_objects, rank, world
from fastreid_uns.utils.paths import path_manager
from fastreid_uns.utils.progress import progress
from fastreid_uns.utils.transfer import to_device

KINDS = ("colors", "images")
_INSTEAD = "INPUT.CAMERA_STYLE.KIND: colors needs no files; CAMERA_STYLE: 0 in INPUT.AUGMENTS switches styles off."
_BATCH = 64
_FRACTION = 16  # bits after the point
_MOST = 8.0  # a larger gain of contrast is that of an almost uniform camera
# rows: grey, red against blue, green against both; of unit length, at right angles
_OPPONENT = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
_OPPONENT = _OPPONENT / _OPPONENT.norm(dim=1, keepdim=True)


class CameraStyle(ABC):
    """Shows images as other cameras would, before they are augmented.

    Args:
        train_set: the images. Those of labelled sources stay as they are, their cameras are others.

    Attributes:
        numbers: the C known cameras of the N unlabelled images, ascending. A style is named by its position there.

    Raises:
        ValueError: fewer than two cameras are known.
    """

    def __init__(self, train_set: TrainSet) -> None:
        count = train_set.num_images
        own = train_set.cameras[:count]
        self.numbers: list[int] = own[own >= 0].unique().tolist()
        if len(self.numbers) < 2:
            known = f"camera {self.numbers[0]} only" if self.numbers else "no camera at all"
            raise InvalidValue(
                f"INPUT.AUGMENTS: a preset has CAMERA_STYLE above 0, but of the {count:,} training images {known} is "
                f"known; two or more are needed. Set CAMERA_STYLE to 0, or give the data set its cameras."
            )
        place = torch.full((self.numbers[-1] + 1,), -1)
        place[self.numbers] = torch.arange(len(self.numbers))
        self._place = torch.full((len(train_set),), -1)
        self._place[:count] = torch.where(own < 0, own, place[own.clamp_min(0)])

    def choose(self, index: Tensor, draws: Tensor, probability: float) -> Tensor:
        """(B,) style in which each image is shown, one of another camera; -1 = as it is.

        Args:
            index: (B,) int64, positions of the images.
            draws: (2,B) uniform in [0,1): whether an image is changed, and into which style.
            probability: of a change. Images of an unknown camera, and those of the sources, never change.
        """
        own = self._place[index]
        other = (draws[1] * (len(self.numbers) - 1)).long()
        other += other >= own
        return torch.where((draws[0] < probability) & (own >= 0), other, -1)

    @abstractmethod
    def stream(
        self, plan: Sequence[Sequence[int]], styles: Sequence[Tensor], pixels: Iterator[Tensor], device: torch.device
    ) -> Iterator[list[Tensor]]:
        """For each batch of the plan its V views, uint8 (B,3,H,W) on `device`.

        Args:
            plan: the indices of each batch.
            styles: (V,B) for each batch, as `choose` gives them.
            pixels: the images of each batch as they are, uint8 (B,3,H,W); they stay so.
            device: where the pixels are.
        """


class ColourStyle(CameraStyle):
    """Gives an image the mean and the spread of another camera's colours.

    The space is RGB of 0..255 turned to three orthonormal axes: grey, red against blue, green against both. There each
    coordinate x of camera s becomes (x - mean_s) * deviation_t / deviation_s + mean_t. The numbers of a camera are
    those of all pixels of its images at the size of training. They come from integer sums, and the change is computed
    in integers, so that they do not depend on the device, the cache, or the number of processes; nothing of it needs to
    be saved. Several processes share the one pass over the images; all must call.

    Args:
        train_set: see `CameraStyle`.
        device: where the sums are made.

    Raises:
        ValueError: fewer than two cameras are known.

    Source: Reinhard et al. 2001, eq. 10-11; differs: statistics of a camera, not of a picture, in linear opponent axes
    (Ohta et al. 1980), and a deviation changes by a factor of at most 8.
    """

    def __init__(self, train_set: TrainSet, *, device: torch.device | str = "cpu") -> None:
        super().__init__(train_set)
        mean, covariance = self._moments(train_set.images, torch.device(device))
        mean = mean @ _OPPONENT.T
        spread = torch.einsum("ij,cjk,ik->ci", _OPPONENT, covariance, _OPPONENT).clamp_min(0).sqrt()
        gain = (spread[None] / spread[:, None].clamp_min(1e-6)).clamp(1 / _MOST, _MOST)  # (from, to, axis)
        matrix = torch.einsum("ai,sta,aj->stij", _OPPONENT, gain, _OPPONENT)
        shift = (mean[None] - gain * mean[:, None]) @ _OPPONENT
        fixed = torch.cat([matrix, shift[..., None]], dim=3) * 2**_FRACTION
        self._changes = fixed.round().to(torch.int32)  # (C,C,3,4)

    def stream(
        self, plan: Sequence[Sequence[int]], styles: Sequence[Tensor], pixels: Iterator[Tensor], device: torch.device
    ) -> Iterator[list[Tensor]]:
        """See `CameraStyle.stream`."""
        for batch, wanted, given in zip(plan, styles, pixels, strict=True):
            own = self._place[torch.tensor(batch, dtype=torch.int64)]
            yield [self._changed(given, own, style) for style in wanted]

    def _changed(self, pixels: Tensor, own: Tensor, style: Tensor) -> Tensor:
        chosen = (style >= 0).nonzero().flatten()
        if not len(chosen):
            return pixels
        rows = to_device(chosen, pixels.device)
        changes = to_device(self._changes[own[chosen], style[chosen]], pixels.device)
        return pixels.index_copy(0, rows, _change(pixels[rows], changes))

    def _moments(self, images: ImageSet, device: torch.device) -> tuple[Tensor, Tensor]:
        """(C,3) mean and (C,3,3) covariance of the colours of each camera, float64.

        Every sum is a whole number below 2^53, so that float64 holds it exactly in whatever order it is made.
        """
        count = len(self.numbers)
        first = torch.zeros((count, 3), dtype=torch.float64, device=device)
        second = torch.zeros((count, 3, 3), dtype=torch.float64, device=device)
        mine = (self._place >= 0).nonzero().flatten()[rank() :: world()]
        batches = [part.tolist() for part in mine.split(_BATCH)]
        stream = progress(images.stream(batches, device), "colours of cameras", total=len(batches))
        for batch, pixels in zip(batches, stream, strict=True):
            flat = pixels.flatten(2).double()
            place = to_device(self._place[batch], device)
            first.index_add_(0, place, flat.sum(2))
            second.index_add_(0, place, flat @ flat.mT)
        shares = gather_objects((first.cpu(), second.cpu()))
        area = images.size[0] * images.size[1]
        total = torch.bincount(self._place[self._place >= 0], minlength=count).double() * area
        mean = torch.stack([share[0] for share in shares]).sum(0) / total[:, None]
        square = torch.stack([share[1] for share in shares]).sum(0) / total[:, None, None]
        return mean, square - mean[:, :, None] * mean[:, None, :]


class GeneratedStyle(CameraStyle):
    """Shows generated pictures in place of images.

    Args:
        train_set: see `CameraStyle`.
        images: the generated pictures, in any order.
        origins: (G,) index of the image that each picture shows anew. A picture that is missing is never wanted: the
            image is then shown as it is.

    `images.cameras` says in the style of which camera each picture is.

    Raises:
        ValueError: fewer than two cameras are known.
    """

    def __init__(self, train_set: TrainSet, images: ImageSet, origins: Tensor) -> None:
        super().__init__(train_set)
        self.images = images
        self._table = torch.full((len(train_set), len(self.numbers)), -1)
        style = torch.searchsorted(torch.tensor(self.numbers), images.cameras)
        self._table[origins, style] = torch.arange(len(origins))

    def stream(
        self, plan: Sequence[Sequence[int]], styles: Sequence[Tensor], pixels: Iterator[Tensor], device: torch.device
    ) -> Iterator[list[Tensor]]:
        """See `CameraStyle.stream`; the pictures are read ahead like the images."""
        rows = [
            torch.where(wanted < 0, -1, self._table[torch.tensor(batch)[None], wanted.clamp_min(0)])
            for batch, wanted in zip(plan, styles, strict=True)
        ]
        batches = [found[found >= 0].tolist() for found in rows]
        pictures = self.images.stream([batch for batch in batches if batch], device)
        for given, found in zip(pixels, rows, strict=True):
            views = [given] * len(found)
            if bool((found >= 0).any()):
                parts = next(pictures).split((found >= 0).sum(1).tolist())
                for view, (row, part) in enumerate(zip(found, parts, strict=True)):
                    chosen = to_device((row >= 0).nonzero().flatten(), device)
                    views[view] = given.index_copy(0, chosen, part)
            yield views


def generated_images(records: Sequence[Record], folder: str) -> tuple[list[Record], Tensor]:
    """The pictures of a folder that show each image in the style of each other camera.

    Args:
        records: the N images; their cameras count from 0, those in file names from 1.
        folder: holds `<stem>_fake_<camera>to<other>.jpg` or `<stem>_fake_<other>.jpg` for each image and other camera,
            such as `0002_c1s1_000451_03_fake_1to2.jpg`.

    Returns:
        Records whose camera is that of the style, and (G,) int64, index of the image that each shows. Images of an
        unknown camera have none.

    Raises:
        FileNotFoundError: the folder, or one of its files, is missing.
        ValueError: no folder is named, or two images have the same stem.
    """
    where = "INPUT.CAMERA_STYLE.FOLDER"
    if not folder:
        raise InvalidValue(f"{where} is empty; KIND images reads a folder of generated pictures. Name it. {_INSTEAD}")
    if not path_manager.isdir(folder):
        raise MissingFile(
            f"{where}: there is no folder {folder}; KIND images reads pictures such as "
            f"0002_c1s1_000451_03_fake_1to2.jpg from it. Put them there, or name another FOLDER. {_INSTEAD}"
        )
    stems = [splitext(basename(record.path))[0] for record in records]
    double = [stem for stem, times in Counter(stems).items() if times > 1]
    if double:
        raise InvalidValue(
            f"{where}: {len(double):,} names of training images occur more than once, the first: {double[0]}; the "
            f"picture of which image is meant, its name cannot say. Rename the images. {_INSTEAD}"
        )
    there = set(path_manager.ls(folder))
    cameras = sorted({record.camera for record in records if record.camera >= 0})
    found: list[Record] = []
    origins: list[int] = []
    missing: list[str] = []
    for index, (record, stem) in enumerate(zip(records, stems, strict=True)):
        for other in cameras:
            if record.camera < 0 or other == record.camera:
                continue
            names = (f"{stem}_fake_{record.camera + 1}to{other + 1}.jpg", f"{stem}_fake_{other + 1}.jpg")
            name = next((name for name in names if name in there), None)
            if name is None:
                missing.append(names[0])
            else:
                found.append(Record(join(folder, name), -1, other))
                origins.append(index)
    if missing:
        raise MissingFile(
            f"{where}: {len(missing):,} of {len(missing) + len(found):,} pictures are missing in {folder}, the first: "
            f"{', '.join(missing[:3])}; every image is needed in the style of every other camera, cameras counted "
            f"from 1. Add them. {_INSTEAD}"
        )
    return found, torch.tensor(origins, dtype=torch.int64)


def _change(pixels: Tensor, changes: Tensor) -> Tensor:
    """uint8 (n,3,H,W) after the affine map (n,3,4) of its colours, in whole numbers: equal on every device."""
    changes = changes[..., None, None]
    red, green, blue = pixels.to(torch.int32).unbind(1)
    half = 1 << (_FRACTION - 1)
    out = torch.empty_like(pixels)
    for channel in range(3):
        by_red, by_green, by_blue, shift = changes[:, channel].unbind(1)
        value = red * by_red + green * by_green + blue * by_blue + (shift + half)
        out[:, channel] = (value >> _FRACTION).clamp(0, 255).to(torch.uint8)
    return out
