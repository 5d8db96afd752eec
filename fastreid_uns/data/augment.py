"""Random changes of a batch of images: on the device, each image with numbers of its own."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.registry import AUGMENT_REGISTRY
from fastreid_uns.utils.transfer import to_device

ERASE_FILLS = ("mean", "zero")
_TRIES_ERASE = 100
_TRIES_CROP = 10
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L


@AUGMENT_REGISTRY.register()
class Augment:
    """One preset of augmentation: an entry of `INPUT.AUGMENTS`.

    Order: resized crop and rotation, flip, pad and crop, jitter, blur, gray, erase. All random numbers are drawn on
    the CPU and apart from the images, so that a run does not depend on the device, the cache or the process count.

    Args:
        mean, std: of the channels in 0..1, by which the encoder normalises; they set the fill of erasing.
        camera_style: probability that the loader shows the image as another camera would, before all else; see
            `INPUT.CAMERA_STYLE` and `data.camera_style`.
        flip: probability of a mirror image.
        pad: pixels of black on each side before a random crop to the old size; 0 = none.
        resized_crop: smallest and largest share of the area that a random crop keeps, () = none.
        resized_crop_aspect: smallest and largest width / height of such a crop, in pixels.
        rotation: largest angle, degrees to either side.
        jitter: probability of a change of colour by the four that follow.
        brightness, contrast, saturation: largest change of the factor 1.
        hue: largest turn, fraction of the circle, at most 0.5.
        blur: probability of a Gaussian blur.
        blur_sigma: smallest and largest standard deviation, pixels.
        gray: probability of a grey image.
        erase: probability of one filled rectangle.
        erase_area: smallest and largest share of the area that it takes.
        erase_aspect: smallest and largest height / width.
        erase_fill: `mean` = what the published recipes fill in, the channel means written into the *normalised*
            image, that is mean * std + mean in 0..1; `zero` = zero in the normalised image, that is the mean colour.

    Raises:
        ValueError: a number or a range out of bounds, or an unknown fill.

    Source: random erasing as Zhong et al. 2020, algorithm 1, aspect drawn uniformly; differs: tries end at 100.
    Crop and rotation sample bilinearly in one step; differs: a corner that rotation uncovers shows what lies beside
    the crop, and black only outside of the image. The steps of jitter keep their order; differs: torchvision shuffles.

    Example:
        >>> augment = Augment(flip=1.0, pad=0, erase=0.0)
        >>> images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 3, 1, 3)
        >>> parameters = augment.sample_parameters(1, (1, 3), torch.Generator().manual_seed(0))
        >>> augment(images, parameters)[0, 0]  # mirrored, in 0..1
        tensor([[1.0000, 0.2000, 0.0000]])
    """

    def __init__(
        self,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        *,
        camera_style: float = 0.0,
        flip: float = 0.5,
        pad: int = 10,
        resized_crop: Sequence[float] = (),
        resized_crop_aspect: Sequence[float] = (0.33, 0.5),
        rotation: float = 0.0,
        jitter: float = 0.0,
        brightness: float = 0.0,
        contrast: float = 0.0,
        saturation: float = 0.0,
        hue: float = 0.0,
        blur: float = 0.0,
        blur_sigma: Sequence[float] = (0.1, 2.0),
        gray: float = 0.0,
        erase: float = 0.5,
        erase_area: Sequence[float] = (0.02, 0.4),
        erase_aspect: Sequence[float] = (0.3, 3.33),
        erase_fill: str = "mean",
    ) -> None:
        chances = {
            "camera_style": camera_style,
            "flip": flip,
            "jitter": jitter,
            "blur": blur,
            "gray": gray,
            "erase": erase,
        }
        for name, value in chances.items():
            _check(name, value, 0 <= value <= 1, "a probability in 0..1")
        for name, value in {"brightness": brightness, "contrast": contrast, "saturation": saturation}.items():
            _check(name, value, 0 <= value <= 1, "a change in 0..1")
        _check("hue", hue, 0 <= hue <= 0.5, "a fraction of the circle in 0..0.5")
        _check("pad", pad, pad >= 0, "a number of pixels from 0")
        _check("rotation", rotation, 0 <= rotation <= 180, "an angle in 0..180 degrees")
        if resized_crop:
            _check_range("resized_crop", resized_crop, 1.0)
        _check_range("resized_crop_aspect", resized_crop_aspect)
        _check_range("blur_sigma", blur_sigma)
        _check_range("erase_area", erase_area, 1.0)
        _check_range("erase_aspect", erase_aspect)
        _check("erase_fill", erase_fill, erase_fill in ERASE_FILLS, f"one of {', '.join(ERASE_FILLS)}")
        self.camera_style = camera_style
        self.flip, self.pad, self.rotation, self.jitter = flip, pad, rotation, jitter
        self.resized_crop, self.resized_crop_aspect = tuple(resized_crop), tuple(resized_crop_aspect)
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue
        self.blur, self.blur_sigma, self.gray = blur, tuple(blur_sigma), gray
        self.erase, self.erase_area, self.erase_aspect = erase, tuple(erase_area), tuple(erase_aspect)
        self.fill = [m * s + m if erase_fill == "mean" else m for m, s in zip(mean, std, strict=True)]

    def sample_parameters(self, n: int, size: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
        """Random numbers for n images of H x W pixels.

        Args:
            n: images.
            size: H, W.
            generator: on the CPU; how far it advances depends on the preset and n alone.

        Returns:
            Tensors on the CPU with n rows each, one for each operation that the preset has: `warp` (n,2,3) float32,
            `flip` bool, `shift` (n,2) int64 in 0..2*pad (row, column), `jitter` (n,5) float32 (chosen or not, three
            factors, turn of hue), `blur` (n,) float32 (sigma, 0 = none), `gray` bool, `erase` (n,4) int64 (top, left,
            height, width; height 0 = none).
        """
        parameters: dict[str, Tensor] = {}

        def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
            return torch.rand((n, *shape), generator=generator) * (high - low) + low

        if self.resized_crop or self.rotation:
            angle = torch.deg2rad(uniform(low=-self.rotation, high=self.rotation))
            crop = torch.tensor([0.0, 0.0, *size]).expand(n, 4)
            if self.resized_crop:
                area = uniform(_TRIES_CROP, low=self.resized_crop[0], high=self.resized_crop[1]) * math.prod(size)
                low, high = (math.log(1 / ratio) for ratio in reversed(self.resized_crop_aspect))
                aspect = uniform(_TRIES_CROP, low=low, high=high).exp()
                fallback = _central_crop(size, self.resized_crop_aspect)
                crop = _first_fit(area, aspect, uniform(2), size, fallback).float()
            parameters["warp"] = _warp_matrices(crop, angle, size)
        if self.flip:
            parameters["flip"] = uniform() < self.flip
        if self.pad:
            parameters["shift"] = torch.randint(0, 2 * self.pad + 1, (n, 2), generator=generator)
        if self.jitter:
            change = torch.tensor([self.brightness, self.contrast, self.saturation, self.hue])
            factors = uniform(4, low=-1.0) * change + torch.tensor([1.0, 1.0, 1.0, 0.0])
            parameters["jitter"] = torch.cat([(uniform(1) < self.jitter).float(), factors], dim=1)
        if self.blur:
            parameters["blur"] = uniform(low=self.blur_sigma[0], high=self.blur_sigma[1]) * (uniform() < self.blur)
        if self.gray:
            parameters["gray"] = uniform() < self.gray
        if self.erase:
            area = uniform(_TRIES_ERASE, low=self.erase_area[0], high=self.erase_area[1]) * math.prod(size)
            aspect = uniform(_TRIES_ERASE, low=self.erase_aspect[0], high=self.erase_aspect[1])
            smaller = (size[0] - 1, size[1] - 1)  # a rectangle leaves at least one row and one column
            box = _first_fit(area, aspect, uniform(2), size, (0, 0, 0, 0), largest=smaller)
            parameters["erase"] = box * (uniform(1) < self.erase)
        return parameters

    def __call__(self, images: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        """The changed images.

        Args:
            images: (B,3,H,W) uint8 on any device; stays as it is.
            parameters: of `sample_parameters`, B rows each, on the CPU.

        Returns:
            (B,3,H,W) float32 in 0..1 on the device of `images`.
        """
        if "warp" in parameters:
            images = _warp(images.float(), parameters["warp"])
        if "flip" in parameters or "shift" in parameters:
            none = torch.zeros((len(images), 2), dtype=torch.int64)
            offset = parameters["shift"] - self.pad if "shift" in parameters else none
            images = _flip_shift_scale(images, parameters.get("flip", none[:, 0].bool()), offset)
        else:
            images = images.float().div_(255) if images.dtype == torch.uint8 else images.div_(255)
        blur = functools.partial(_blur, reach=math.ceil(3 * self.blur_sigma[1]))
        for name, change in (("jitter", _jitter), ("blur", blur), ("gray", _gray)):
            if name in parameters:
                chosen = parameters[name].reshape(len(images), -1)[:, 0].nonzero().flatten()
                if len(chosen):
                    rows = to_device(chosen, images.device)
                    images[rows] = change(images[rows], parameters[name][chosen])
        if "erase" in parameters:
            _erase(images, parameters["erase"], self.fill)
        return images


def _check(name: str, value: object, good: bool, accepted: str) -> None:
    if not good:
        raise InvalidValue(f"INPUT.AUGMENTS: {name.upper()} is {value!r}; {accepted} is accepted. Change the preset.")


def _check_range(name: str, value: Sequence[float], limit: float = math.inf) -> None:
    good = len(value) == 2 and 0 < value[0] <= value[1] <= limit
    _check(name, list(value), good, f"[smallest, largest] above 0{f', at most {limit:g},' if limit < math.inf else ''}")


def _first_fit(
    area: Tensor,
    aspect: Tensor,
    place: Tensor,
    size: tuple[int, int],
    fallback: tuple[int, int, int, int],
    largest: tuple[int, int] | None = None,
) -> Tensor:
    """(n,4) int64 top, left, height, width: the first of T tries (n,T) that is no larger than `largest`."""
    height, width = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    most = largest or size
    fits = (height <= most[0]) & (width <= most[1])
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    extent = torch.cat([height.gather(1, first), width.gather(1, first)], dim=1)
    corner = (place * (torch.tensor(size) - extent + 1)).floor()
    box = torch.cat([corner, extent], dim=1).long()
    return torch.where(fits.any(1, keepdim=True), box, torch.tensor(fallback))


def _central_crop(size: tuple[int, int], aspect: Sequence[float]) -> tuple[int, int, int, int]:
    """The largest crop in the middle whose width / height is within the range."""
    height, width = size
    width = min(width, round(height * aspect[1]))
    height = min(height, round(width / aspect[0]))
    return (size[0] - height) // 2, (size[1] - width) // 2, height, width


def _warp_matrices(crop: Tensor, angle: Tensor, size: tuple[int, int]) -> Tensor:
    """(n,2,3) matrices from places of the result to places of the image, both in -1..1 with x before y."""
    height, width = size
    top, left, crop_height, crop_width = crop.unbind(1)
    scale_y, scale_x = crop_height / height, crop_width / width
    centre_y, centre_x = (2 * top + crop_height) / height - 1, (2 * left + crop_width) / width - 1
    cos, sin = angle.cos(), angle.sin()
    row_x = torch.stack([scale_x * cos, -scale_x * sin * height / width, centre_x], dim=1)
    row_y = torch.stack([scale_y * sin * width / height, scale_y * cos, centre_y], dim=1)
    return torch.stack([row_x, row_y], dim=1)


def _warp(images: Tensor, matrices: Tensor) -> Tensor:
    grid = F.affine_grid(to_device(matrices, images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _flip_shift_scale(images: Tensor, flip: Tensor, offset: Tensor) -> Tensor:
    """Mirror the chosen images, give each the window that begins at its offset, black outside, and divide by 255."""
    if images.device.type != "cpu":
        return _flip_shift_scale_by_index(images, flip, offset)
    from fastreid_uns.data import augment_kernels
    from fastreid_uns.utils.compiled import over_rows

    out = np.empty(images.shape, np.float32)  # torch's own block would not be reused: a page fault for every 4 KiB
    over_rows(augment_kernels.flip_shift_scale, len(images), images.numpy(), flip.numpy(), offset.numpy(), out)
    return torch.from_numpy(out)


def _flip_shift_scale_by_index(images: Tensor, flip: Tensor, offset: Tensor) -> Tensor:
    """A fixed number of kernels for a batch of any size: what a GPU wants. Black is what is divided by infinity."""
    flip, offset = to_device(flip, images.device), to_device(offset, images.device)
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device) + offset[:, :1]
    columns = torch.arange(width, device=images.device) + offset[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    columns = torch.where(flip[:, None], width - 1 - columns, columns).clamp(0, width - 1)
    place = (rows.clamp(0, height - 1) * width)[:, :, None] + columns[:, None]
    picked = images.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, images.shape[1], -1))
    return picked.view(images.shape) / torch.where(inside, 255.0, torch.inf)[:, None]


def _luma(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2]


def _gray(images: Tensor, chosen: Tensor) -> Tensor:
    return _luma(images).expand_as(images)


def _jitter(images: Tensor, parameters: Tensor) -> Tensor:
    brightness, contrast, saturation, hue = to_device(parameters[:, 1:], images.device)[:, :, None, None, None].unbind(
        1
    )
    images = (images * brightness).clamp(0, 1)
    images = torch.lerp(_luma(images).mean((1, 2, 3), keepdim=True), images, contrast).clamp(0, 1)
    images = torch.lerp(_luma(images), images, saturation).clamp(0, 1)
    return _turn_hue(images, hue) if bool((parameters[:, 4] != 0).any()) else images


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Add `turn` (fraction of the circle) to the hue; saturation and value of HSV stay."""
    red, green, blue = images.split(1, dim=1)
    value, low = images.amax(1, keepdim=True), images.amin(1, keepdim=True)
    chroma = value - low
    safe = chroma.clamp_min(1e-8)
    sixth = torch.where(
        value == red,
        (green - blue) / safe % 6,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    phase = (torch.arange(5, 0, -2, device=images.device).view(3, 1, 1) + sixth + 6 * turn) % 6
    return value - chroma * torch.minimum(phase, 4 - phase).clamp(0, 1)


def _blur(images: Tensor, sigma: Tensor, reach: int) -> Tensor:
    """Blur by kernels of 2 * reach + 1 pixels; the outermost pixels go on beyond the edge, as in Pillow."""
    count, channels, height, width = images.shape
    steps = torch.arange(-reach, reach + 1)
    kernel = (-0.5 * (steps / sigma[:, None].clamp_min(1e-3)) ** 2).exp()
    kernel = to_device(kernel / kernel.sum(1, keepdim=True), images.device)
    kernel = kernel.repeat_interleave(channels, 0)
    flat = F.pad(images, (reach,) * 4, mode="replicate").view(1, -1, height + 2 * reach, width + 2 * reach)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=count * channels)
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=count * channels)
    return flat.view_as(images).clamp(0, 1)


def _erase(images: Tensor, boxes: Tensor, fill: Sequence[float]) -> None:
    """Fill the boxes, in place."""
    if images.device.type != "cpu":
        return _erase_by_masks(images, boxes, fill)
    from fastreid_uns.data import augment_kernels

    augment_kernels.fill_boxes(0, len(images), images.numpy(), boxes.numpy(), np.array(fill, np.float32))


def _erase_by_masks(images: Tensor, boxes: Tensor, fill: Sequence[float]) -> None:
    height, width = images.shape[-2:]
    top, left, box_height, box_width = to_device(boxes, images.device)[:, :, None].unbind(1)
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    rows_in = (rows >= top) & (rows < top + box_height)
    columns_in = (columns >= left) & (columns < left + box_width)
    inside = rows_in[:, :, None] & columns_in[:, None, :]
    for channel, value in enumerate(fill):
        images[:, channel].masked_fill_(inside, value)
