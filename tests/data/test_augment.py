import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage, stats
from torchvision.transforms import functional as reference

from fastreid_uns.data.augment import Augment, _erase, _erase_by_masks, _flip_shift_scale, _flip_shift_scale_by_index

SIZE = (32, 16)
NOTHING = {"flip": 0.0, "pad": 0, "erase": 0.0}
EVERYTHING = {
    "resized_crop": (0.6, 1.0),
    "rotation": 20.0,
    "jitter": 0.5,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.2,
    "blur": 0.5,
    "gray": 0.3,
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 8, size=SIZE) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8, generator=generator(7))


def normal_range(p: float, n: int) -> float:
    return 4 * math.sqrt(p * (1 - p) / n)


def test_a_preset_without_operations_only_scales():
    view = Augment(**NOTHING)
    assert view.sample_parameters(8, SIZE, generator()) == {}
    assert torch.equal(view(images(), {}), images() / 255)


def test_the_same_seed_gives_the_same_view_and_nothing_else_is_touched():
    view = Augment(**EVERYTHING)
    given, state = images(), torch.get_rng_state()
    first = view(given, view.sample_parameters(8, SIZE, generator(1)))
    assert torch.equal(first, view(given, view.sample_parameters(8, SIZE, generator(1))))
    assert not torch.equal(first, view(given, view.sample_parameters(8, SIZE, generator(2))))
    assert torch.equal(given, images())
    assert torch.equal(torch.get_rng_state(), state)
    assert first.dtype == torch.float32
    assert 0 <= first.min() < first.max() <= 1


def test_each_image_depends_on_its_own_numbers_alone():
    view = Augment(**EVERYTHING)
    draws = view.sample_parameters(8, SIZE, generator())
    whole = view(images(), draws)
    parts = [view(images()[i : i + 3], {k: v[i : i + 3] for k, v in draws.items()}) for i in (0, 3, 6)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


def test_flip_mirrors_at_its_rate():
    assert torch.equal(
        Augment(**{**NOTHING, "flip": 1.0})(images(), {"flip": torch.ones(8).bool()}), images().flip(3) / 255
    )
    share = Augment(flip=0.3, pad=0, erase=0).sample_parameters(20_000, SIZE, generator())["flip"].float().mean()
    assert abs(share - 0.3) < normal_range(0.3, 20_000)


def test_shift_is_uniform_over_the_padding():
    shift = Augment(pad=3).sample_parameters(20_000, SIZE, generator())["shift"]
    assert shift.shape == (20_000, 2)
    joint = np.bincount((shift[:, 0] * 7 + shift[:, 1]).numpy(), minlength=49)
    assert len(joint) == 49
    assert stats.chisquare(joint).pvalue > 1e-3


def padded_crop(image, mirror, row, column, pad):
    image = image.flip(2) if mirror else image
    return F.pad(image, (pad,) * 4)[:, row : row + SIZE[0], column : column + SIZE[1]]


def test_pad_and_crop_equals_the_plain_form():
    view = Augment(pad=10, erase=0)
    draws = view.sample_parameters(8, SIZE, generator(3))
    draws["shift"][:4] = torch.tensor([[0, 0], [20, 20], [10, 10], [0, 20]])
    steps = zip(images(), draws["flip"].tolist(), draws["shift"].tolist(), strict=True)
    expected = torch.stack([padded_crop(image, mirror, *shift, 10) for image, mirror, shift in steps])
    assert draws["flip"].any()
    assert not draws["flip"].all()
    assert torch.equal(view(images(), draws), expected / 255)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("threads", [1, 2])
def test_both_ways_to_shift_are_equal(dtype, threads, monkeypatch):
    """Also by more than the image is large, and of images that are no block of memory."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    draws = Augment(pad=40).sample_parameters(96, SIZE, generator())
    given = images(96)[:, :, :, : SIZE[1] - 1].to(dtype)
    args = (given, draws["flip"], draws["shift"] - 40)
    assert torch.equal(_flip_shift_scale(*args), _flip_shift_scale_by_index(*args))


def test_both_ways_to_erase_are_equal():
    boxes = Augment(erase=0.7, erase_area=(0.1, 0.9)).sample_parameters(64, SIZE, generator())["erase"]
    by_loops, by_masks = images(64) / 255, images(64) / 255
    _erase(by_loops, boxes, [0.1, 0.2, 0.3])
    _erase_by_masks(by_masks, boxes, [0.1, 0.2, 0.3])
    assert (by_loops != images(64) / 255).any()
    assert torch.equal(by_loops, by_masks)


def test_erased_boxes_lie_inside_and_have_the_size_asked_for():
    height, width = 256, 128
    view = Augment(erase=0.5, erase_area=(0.02, 0.4), erase_aspect=(0.3, 3.33))
    top, left, h, w = view.sample_parameters(20_000, (height, width), generator())["erase"].double().unbind(1)
    hit = h > 0
    assert abs(hit.double().mean() - 0.5) < normal_range(0.5, 20_000)
    assert ((h + w + top + left)[~hit] == 0).all()
    top, left, h, w = (value[hit] for value in (top, left, h, w))
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()
    # rounding moves each side by half a pixel at most
    assert ((h + 0.5) * (w + 0.5) >= 0.02 * height * width).all()
    assert ((h - 0.5) * (w - 0.5) <= 0.4 * height * width).all()
    assert ((h + 0.5) / (w - 0.5) >= 0.3).all()
    assert ((h - 0.5) / (w + 0.5) <= 3.33).all()
    room = (height - h) > 20
    position = (top / (height - h + 1))[room]
    assert (
        stats.kstest(position.numpy() + np.random.default_rng(0).random(len(position)) / 200, "uniform").pvalue > 1e-6
    )


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_erased_pixels_hold_the_fill_and_others_stay(fill):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.1)
    view = Augment(mean, std, flip=0, pad=0, erase=1.0, erase_fill=fill)
    draws = {"erase": torch.tensor([[2, 1, 5, 3], [0, 0, 0, 0], [31, 15, 1, 1]])}
    result = view(images(3), draws)
    expected = images(3) / 255
    normalised = torch.tensor(mean) if fill == "mean" else torch.zeros(3)
    value = normalised * torch.tensor(std) + torch.tensor(mean)
    for image, (top, left, h, w) in zip(expected, draws["erase"].tolist(), strict=True):
        image[:, top : top + h, left : left + w] = value[:, None, None]
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-7)


def jittered(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0) -> torch.Tensor:
    row = torch.tensor([[1.0, brightness, contrast, saturation, hue]])
    return Augment(**NOTHING, jitter=1.0)(images(), {"jitter": row.repeat(8, 1)})


def test_colour_changes_equal_those_of_torchvision():
    plain = images() / 255
    close = {"rtol": 0, "atol": 2e-3}  # its luma weights have three or four digits
    torch.testing.assert_close(jittered(brightness=1.3), reference.adjust_brightness(plain, 1.3), **close)
    torch.testing.assert_close(jittered(contrast=0.6), reference.adjust_contrast(plain, 0.6), **close)
    torch.testing.assert_close(jittered(saturation=1.4), reference.adjust_saturation(plain, 1.4), **close)
    torch.testing.assert_close(jittered(hue=0.2), reference.adjust_hue(plain, 0.2), **close)
    torch.testing.assert_close(jittered(hue=-0.45), reference.adjust_hue(plain, -0.45), **close)


def test_jitter_draws_its_range_and_changes_only_the_chosen():
    view = Augment(**NOTHING, jitter=0.25, brightness=0.4, contrast=0.3, saturation=0.2, hue=0.1)
    draws = view.sample_parameters(10_000, SIZE, generator())["jitter"]
    assert abs(draws[:, 0].mean() - 0.25) < normal_range(0.25, 10_000)
    low, high = torch.tensor([0.6, 0.7, 0.8, -0.1]), torch.tensor([1.4, 1.3, 1.2, 0.1])
    assert stats.kstest(((draws[:, 1:] - low) / (high - low)).flatten().numpy(), "uniform").pvalue > 1e-3
    few = {"jitter": draws[:8].clone()}
    few["jitter"][:, 0] = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0])
    same = (view(images(), few) == images() / 255).flatten(1).all(1)
    assert same.tolist() == [False, True, True, False, True, True, True, True]


def test_grey_images_have_their_luma_in_each_channel():
    result = Augment(**NOTHING, gray=0.5)(images(2), {"gray": torch.tensor([False, True])})
    red, green, blue = images(2)[1].double() / 255
    luma = (0.299 * red + 0.587 * green + 0.114 * blue).float()
    torch.testing.assert_close(result[1], luma.expand(3, -1, -1))
    assert torch.equal(result[0], images(2)[0] / 255)
    share = Augment(gray=0.2).sample_parameters(20_000, SIZE, generator())["gray"].float().mean()
    assert abs(share - 0.2) < normal_range(0.2, 20_000)


def test_blur_is_gaussian():
    sigmas = torch.tensor([0.0, 0.1, 0.7, 2.0])
    result = Augment(**NOTHING, blur=0.5)(images(4), {"blur": sigmas})
    plain = images(4).double() / 255
    for image, sigma, blurred in zip(plain, sigmas.tolist(), result, strict=True):
        expected = ndimage.gaussian_filter(image.numpy(), (0, sigma, sigma), mode="nearest", radius=(0, 6, 6))
        torch.testing.assert_close(blurred, torch.from_numpy(expected).float(), rtol=0, atol=1e-6)


def test_blur_draws_sigma_at_its_rate():
    sigma = Augment(blur=0.5, blur_sigma=(0.1, 2.0)).sample_parameters(10_000, SIZE, generator())["blur"]
    assert abs((sigma > 0).float().mean() - 0.5) < normal_range(0.5, 10_000)
    assert stats.kstest(((sigma[sigma > 0] - 0.1) / 1.9).numpy(), "uniform").pvalue > 1e-3


def test_a_quarter_turn_turns_the_pixels():
    view = Augment(**NOTHING, rotation=90.0)
    square = images(1, (12, 12))
    draws = view.sample_parameters(1, (12, 12), generator())
    draws["warp"] = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]])
    turned = view(square, draws)
    both = [torch.rot90(square / 255, k, (2, 3)) for k in (1, 3)]
    assert min((turned - other).abs().max() for other in both) < 1e-5


def test_rotation_keeps_shapes_in_an_oblong_image():
    """A disc in the middle of an oblong image stays that disc under any rotation."""
    height, width = 64, 32
    y, x = torch.meshgrid(torch.arange(height) - 31.5, torch.arange(width) - 15.5, indexing="ij")
    disc = (255 * (13 - (y**2 + x**2).sqrt()).clamp(0, 1)).to(torch.uint8).expand(16, 3, -1, -1)
    view = Augment(**NOTHING, rotation=180.0)
    draws = view.sample_parameters(16, (height, width), generator())
    assert (view(disc, draws) - disc / 255).abs().mean() < 0.01
    angles = torch.atan2(draws["warp"][:, 1, 0] * height / width, draws["warp"][:, 0, 0])
    assert angles.abs().max() > 1.5


def test_a_resized_crop_shows_its_part_of_the_image():
    """The upper left quarter of a 32x16 image, twice as large."""
    view = Augment(**NOTHING, resized_crop=(0.25, 0.25), resized_crop_aspect=(0.5, 0.5))
    warp = torch.tensor([[[0.5, 0.0, -0.5], [0.0, 0.5, -0.5]]])
    quarter = images(1)[:, :, :16, :8].float() / 255
    expected = F.interpolate(quarter, scale_factor=2, mode="bilinear", align_corners=False)
    inside = (..., slice(1, -1), slice(1, -1))  # the outermost rows mix with what lies beside the crop
    torch.testing.assert_close(view(images(1), {"warp": warp})[inside], expected[inside])


def test_resized_crops_have_the_area_and_aspect_asked_for():
    height, width = 256, 128
    view = Augment(**NOTHING, resized_crop=(0.64, 1.0), resized_crop_aspect=(0.33, 0.5))
    warp = view.sample_parameters(5000, (height, width), generator())["warp"].double()
    scale_x, scale_y = warp[:, 0, 0], warp[:, 1, 1]
    assert (warp[:, 0, 1] == 0).all()
    h, w = scale_y * height, scale_x * width
    # a crop that does not fit in ten tries is the largest one in the middle: the whole image at aspect 1/2
    assert (h * w >= (0.64 * height * width) - (h + w)).all()
    assert ((w + 1) / h >= 0.33).all()
    assert ((w - 1) / h <= 0.5).all()
    assert (warp[:, 0, 2].abs() + scale_x <= 1 + 1e-6).all()
    assert (warp[:, 1, 2].abs() + scale_y <= 1 + 1e-6).all()
    assert (scale_x * scale_y).std() > 0.02


def test_a_crop_that_never_fits_is_the_largest_in_the_middle():
    """A square of 60 pixels and width / height of 2 to 3: 60 x 30 in the middle, no larger area has that aspect."""
    view = Augment(**NOTHING, resized_crop=(1.0, 1.0), resized_crop_aspect=(2.0, 3.0))
    warp = view.sample_parameters(1, (60, 60), generator())["warp"]
    torch.testing.assert_close(warp, torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.5, 0.0]]]))


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"flip": 1.5}, r"INPUT.AUGMENTS: FLIP is 1.5; a probability in 0..1 is accepted"),
        ({"pad": -1}, "PAD is -1"),
        ({"hue": 0.7}, "HUE is 0.7"),
        ({"brightness": 2.0}, "BRIGHTNESS is 2.0"),
        ({"rotation": 200.0}, "ROTATION is 200.0"),
        ({"erase_area": (0.4, 0.02)}, r"ERASE_AREA is \[0.4, 0.02\]; \[smallest, largest\] above 0, at most 1"),
        ({"erase_aspect": (0.3,)}, r"ERASE_ASPECT is \[0.3\]"),
        ({"resized_crop": (0.5, 1.5)}, "RESIZED_CROP is"),
        ({"blur_sigma": (0.0, 2.0)}, "BLUR_SIGMA is"),
        ({"resized_crop_aspect": (0.0,)}, "RESIZED_CROP_ASPECT is"),  # without RESIZED_CROP as well
        ({"erase_fill": "noise"}, "ERASE_FILL is 'noise'; one of mean, zero is accepted"),
    ],
)
def test_presets_are_checked(preset, message):
    with pytest.raises(ValueError, match=message):
        Augment(**preset)
