"""Pixels of each kind of picture against Pillow's own operations, and what is said of files that are none."""

from __future__ import annotations

import functools
import io
import os
import pickle
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, features

from fastreid_uns.data.decode import (
    UnreadableImage,
    read_image,
    read_pixels,
    read_size,
)
from fastreid_uns.data.depth import to_eight_bits
from fastreid_uns.errors import InvalidValue, MissingFile, UserError

ORIENTATION = 274
WHITE = (255, 255, 255)


def noise(*shape: int, high: int = 256, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, high, shape).astype(dtype)


def gradient(height: int = 24, width: int = 16) -> np.ndarray:
    """Smooth, without any symmetry: each of the eight orientations gives another picture."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 255 // height, x * 255 // width, (y * y + x) % 256], axis=2).astype(np.uint8)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image)


def read(source, **options) -> np.ndarray:
    image = read_image(source, **options)
    assert image.mode == "RGB"
    return pixels(image)


def encoded(image: Image.Image, form: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


# plain pictures keep their pixels


def test_a_plain_jpeg_keeps_its_pixels_bit_for_bit(tmp_path):
    Image.fromarray(noise(64, 32, 3)).save(tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        whole = pixels(image.convert("RGB"))
        small = pixels(image.convert("RGB").resize((8, 16), Image.Resampling.BICUBIC))
    assert np.array_equal(read(tmp_path / "a.jpg"), whole)
    assert np.array_equal(read(str(tmp_path / "a.jpg")), whole)
    assert np.array_equal(read((tmp_path / "a.jpg").read_bytes()), whole)
    found = read_pixels(tmp_path / "a.jpg", (16, 8))
    assert found.flags.c_contiguous
    assert np.array_equal(found, small.transpose(2, 0, 1))


@pytest.mark.parametrize(("form", "options"), [("JPEG", {}), ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {})])
def test_rgb_files_of_each_format(form, options):
    data = encoded(Image.fromarray(noise(9, 7, 3)), form, **options)
    assert np.array_equal(read(data), pixels(Image.open(io.BytesIO(data)).convert("RGB")))


# orientation


def file_with_orientation(form: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(Image.fromarray(gradient()), form, exif=exif)


FORMS = ["JPEG", "PNG", "TIFF", pytest.param("WEBP", marks=pytest.mark.skipif(not features.check("webp"), reason=""))]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_equals_that_of_pillow(form, orientation, tmp_path):
    data = file_with_orientation(form, orientation)
    expected = pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(read(data), expected)
    assert read(data).shape == ((16, 24, 3) if orientation >= 5 else (24, 16, 3))
    (tmp_path / "a").write_bytes(data)
    assert read_size(tmp_path / "a") == expected.shape[:2]
    assert np.array_equal(read(Image.open(io.BytesIO(data))), expected)  # a Pillow image that a user opened


@pytest.mark.parametrize(
    ("orientation", "undo"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),  # the camera was held upright: a quarter turn clockwise
        (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a, 1)),
    ],
)
def test_orientation_by_hand(orientation, undo):
    assert np.array_equal(read(file_with_orientation("PNG", orientation)), undo(gradient()))


def test_orientation_of_xmp_counts():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><d tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(Image.fromarray(gradient()), "JPEG", xmp=xmp)
    assert np.array_equal(read(data), pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))
    assert read(data).shape == (16, 24, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
def test_a_damaged_orientation_tag_counts_as_none(exif):
    data = encoded(Image.fromarray(gradient()), "JPEG", exif=exif)
    assert np.array_equal(read(data), pixels(Image.open(io.BytesIO(data)).convert("RGB")))


def test_an_unknown_orientation_counts_as_none():
    assert np.array_equal(read(file_with_orientation("PNG", 9)), gradient())


def test_orientation_of_deep_and_transparent_pictures():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    deep = noise(6, 4, high=2**16, dtype=np.uint16)
    for form in ("PNG", "TIFF"):
        found = read(encoded(Image.fromarray(deep), form, exif=exif))[..., 0]
        assert np.array_equal(found, np.rot90(deep >> 8, -1)), form
    data = encoded(Image.fromarray(noise(6, 4, 4)), "PNG", exif=exif)
    assert np.array_equal(read(data), on_white(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))))


# modes


def on_white(image: Image.Image) -> np.ndarray:
    image = image.convert("RGBA")
    return pixels(Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes_equal_the_conversion_of_pillow(mode):
    image = Image.fromarray(noise(9, 7, 3))
    if mode == "LAB":
        image = Image.frombytes("LAB", (7, 9), noise(9, 7, 3).tobytes())
    image = image.convert(mode)
    assert np.array_equal(read(image), pixels(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "La", "RGBa", "PA"])
def test_alpha_is_composed_on_white(mode):
    image = Image.fromarray(noise(9, 7, 4))
    for step in {"La": ["LA", "La"], "PA": ["P", "PA"]}.get(mode, [mode]):
        image = image.convert(step)
    assert np.array_equal(read(image), on_white(image.convert("LA") if mode == "La" else image))


def test_hidden_colours_do_not_show():
    image = Image.new("RGBA", (3, 2), (255, 0, 0, 0))
    assert np.array_equal(read(image), np.full((2, 3, 3), 255))
    image.putpixel((0, 0), (255, 0, 0, 51))  # a fifth of red on white
    assert read(image)[0, 0].tolist() == [255, 204, 204]


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_palettes_with_a_transparent_colour(form):
    image = Image.fromarray(noise(9, 7, 3)).quantize(8)
    data = encoded(image, form, transparency=3)
    opened = Image.open(io.BytesIO(data))
    assert np.array_equal(read(data), on_white(opened))
    assert not np.array_equal(read(data), pixels(opened.convert("RGB")))


def test_palettes_with_alpha_of_each_colour():
    image = Image.fromarray(noise(9, 7, 3)).quantize(4)
    data = encoded(image, "PNG", transparency=bytes([0, 60, 120, 255]))
    assert np.array_equal(read(data), on_white(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize(("mode", "key"), [("RGB", (10, 20, 30)), ("L", 10), ("1", 0)])
def test_one_transparent_colour_without_a_palette(mode, key):
    image = Image.new(mode, (4, 2), key)
    image.putpixel((1, 1), (200, 100, 50) if mode == "RGB" else 255)
    data = encoded(image, "PNG", transparency=key)
    assert np.array_equal(read(data), on_white(Image.open(io.BytesIO(data))))
    assert read(data)[0, 0].tolist() == [255, 255, 255]


def test_jpegs_in_cmyk_and_grey():
    for mode in ("CMYK", "L"):
        data = encoded(Image.fromarray(gradient()).convert(mode), "JPEG")
        assert np.array_equal(read(data), pixels(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("form", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_of_several_frames(form):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    data = encoded(
        frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
    )
    assert np.array_equal(read(data), np.broadcast_to([255, 0, 0], (8, 8, 3)))


# colour profiles

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def profile_with_red_and_green_exchanged() -> bytes:
    """That of sRGB under another name, in which each primary has the tag of the other one."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"swap"), (b"gXYZ", b"rXYZ"), (b"swap", b"gXYZ")):
        data = data.replace(old, new)
    return data.replace("sRGB".encode("utf-16-be"), "test".encode("utf-16-be"))


@pytest.mark.skipif(not features.check("littlecms2"), reason="Pillow without a library for profiles")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_a_colour_profile_is_applied(mode):
    picture = Image.new("RGB", (4, 1))
    for x, colour in enumerate((RED, GREEN, BLUE, WHITE)):
        picture.putpixel((x, 0), colour)
    tagged = encoded(picture.convert(mode), "PNG", icc_profile=profile_with_red_and_green_exchanged())
    expected = np.array([[GREEN, RED, BLUE, WHITE]])
    assert np.abs(read(tagged).astype(int) - expected).max() <= 2


def test_profiles_of_srgb_and_damaged_ones_change_nothing():
    picture = Image.fromarray(gradient())
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    other = profile_with_red_and_green_exchanged()
    for profile in (srgb, other[:200], b"nothing", other.replace(b"RGB ", b"GRAY")):
        assert np.array_equal(read(encoded(picture, "PNG", icc_profile=profile)), pixels(picture))


# depth


def test_sixteen_bits_keep_their_upper_eight():
    deep = (np.arange(2048).reshape(64, 32) * 31).astype(np.uint16)
    for source in (encoded(Image.fromarray(deep), "PNG"), encoded(Image.fromarray(deep), "TIFF"), deep):
        found = read(source)
        assert np.array_equal(found, np.repeat((deep // 256)[..., None], 3, axis=2))


def test_grey_and_colour_of_sixteen_bits_agree():
    """Pillow cannot write colour of 16 bits, so the PPM is written by hand; big endian."""
    deep = noise(5, 4, high=2**16, dtype=np.uint16)
    deep[0, 0] = 65535
    grey = b"P5 4 5 65535\n" + deep.astype(">u2").tobytes()
    colour = b"P6 4 5 65535\n" + np.repeat(deep[..., None], 3, axis=2).astype(">u2").tobytes()
    assert np.abs(read(grey).astype(int) - read(colour)).max() <= 1


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([0, 1, 255], np.uint16, [0, 1, 255]),
        ([0, 1, 255], np.int64, [0, 1, 255]),
        ([0, 16, 256, 4095], np.uint16, [0, 1, 16, 255]),  # 12 bits: value // 16
        ([0, 64, 4096, 16383], np.uint16, [0, 1, 64, 255]),  # 14 bits: value // 64
        ([0, 255, 256, 16384, 65535], np.uint16, [0, 0, 1, 64, 255]),  # 16 bits: value // 256
        ([0, 4096, 65535], np.int32, [0, 16, 255]),
        ([0, 65536, 131071], np.int32, [0, 128, 255]),  # 17 bits: value // 512
        ([0, 2**31, 2**32 - 1], np.uint32, [0, 128, 255]),
        ([0, 2**63], np.uint64, [0, 128]),
        ([False, True], bool, [0, 255]),
        ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),  # 127.5 rounds to the even number
        ([0.0, 0.25, 1.0], np.float16, [0, 64, 255]),
        ([-0.05, 0.2, 1.06], np.float64, [0, 51, 255]),
        ([0.0, 1.0, 127.6, 255.0], np.float32, [0, 1, 128, 255]),
        ([-12.0, 10.4, 271.0], np.float64, [0, 10, 255]),
        ([0.0, 16.0, 4095.0], np.float32, [0, 1, 255]),
        ([0.0, 256.0, 65535.0], np.float32, [0, 1, 255]),
    ],
)
def test_the_largest_value_says_what_the_numbers_mean(values, dtype, expected):
    array = np.array([values], dtype)
    assert to_eight_bits(array).dtype == np.uint8
    assert to_eight_bits(array).tolist() == [expected]
    assert np.array_equal(read(array), np.repeat(np.array([expected])[..., None], 3, axis=2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_deep_tiff_files_follow_the_same_rule(dtype):
    deep = noise(6, 4, high=4096, dtype=dtype)
    deep[0, 0] = 4095
    assert np.array_equal(read(encoded(Image.fromarray(deep), "TIFF"))[..., 0], deep.astype(int) // 16)


def png_of_sixteen_bits(values, transparent=None):
    """Pillow cannot write colour of 16 bits; values (H,W,C), big endian, no filter."""
    height, width, channels = values.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0),
        **({} if transparent is None else {b"tRNS": struct.pack(">3H", *transparent)}),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tiff_of_colour(values, order="<", bits=16, compressed=False, planes=False):
    """Pillow cannot write it; values (H,W,3), one strip for the picture or for each of its planes."""
    height, width, _ = values.shape
    parts = [values[..., i] for i in range(3)] if planes else [values]
    strips = [part.astype(f"{order}u{bits // 8}").tobytes() for part in parts]
    strips = [zlib.compress(strip) for strip in strips] if compressed else strips
    short, long, entries, count = 3, 4, 10, len(strips)
    depths = 8 + 2 + 12 * entries + 4
    places = depths + 2 * 3
    sizes = places + 4 * count
    starts = [sizes + 4 * count + sum(map(len, strips[:i])) for i in range(count)]
    tags = [
        (256, short, 1, width),
        (257, short, 1, height),
        (258, short, 3, depths),
        (259, short, 1, 8 if compressed else 1),
        (262, short, 1, 2),
        (273, long, count, places if count > 1 else starts[0]),
        (277, short, 1, 3),
        (278, short, 1, height),
        (279, long, count, sizes if count > 1 else len(strips[0])),
        (284, short, 1, 2 if planes else 1),
    ]
    forms = {(short, 1): "HHIHxx", (short, 3): "HHII", (long, 1): "HHII", (long, 3): "HHII"}
    table = b"".join(struct.pack(order + forms[tag[1], tag[2]], *tag) for tag in tags)
    numbers = [*starts, *map(len, strips)]
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, entries) + table + bytes(4)
    return head + struct.pack(f"{order}3H{2 * count}I", bits, bits, bits, *numbers) + b"".join(strips)


def ppm_of_sixteen_bits(values):
    return b"P6 %d %d 65535\n" % (values.shape[1], values.shape[0]) + values.astype(">u2").tobytes()


DEEP_FILES = {
    "png": png_of_sixteen_bits,
    "tiff": tiff_of_colour,
    "big endian tiff": functools.partial(tiff_of_colour, order=">"),
    "compressed tiff": functools.partial(tiff_of_colour, compressed=True),
    "ppm": ppm_of_sixteen_bits,
}


def deep_colour(bits: int, channels: int = 3) -> np.ndarray:
    values = noise(5, 4, channels, high=2**bits, dtype=np.uint16)
    values[0, 0, 0] = 2**bits - 1
    return values


@pytest.mark.parametrize("encode", DEEP_FILES.values(), ids=DEEP_FILES)
@pytest.mark.parametrize("bits", [8, 12, 14, 16])
def test_colour_files_of_sixteen_bits_follow_the_same_rule(encode, bits):
    values = deep_colour(bits)
    rounding = 1 if encode is ppm_of_sixteen_bits and bits == 16 else 0  # Pillow scales its values
    assert np.abs(read(encode(values)).astype(int) - (values >> (bits - 8))).max() <= rounding


def test_a_picture_that_pillow_has_not_loaded_follows_it_too():
    values = deep_colour(12)
    assert np.array_equal(read(Image.open(io.BytesIO(png_of_sixteen_bits(values)))), values >> 4)


@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_has_a_depth_of_its_own(channels):
    values = deep_colour(12, channels)
    values[..., -1] = 65535
    colours = np.repeat(values[..., :1], 3, axis=2) if channels == 2 else values[..., :3]
    assert np.array_equal(read(png_of_sixteen_bits(values)), colours >> 4)
    values[1, 1, -1] = 0
    assert read(png_of_sixteen_bits(values))[1, 1].tolist() == [*WHITE]


@pytest.mark.parametrize("bits", [12, 16])
def test_one_transparent_colour_of_sixteen_bits(bits):
    values = deep_colour(bits)
    values[1, 1] = values[2, 2] + [0, 0, 1]  # the upper 8 bits are those of the transparent one
    expected = values >> (bits - 8)
    expected[2, 2] = WHITE
    assert np.array_equal(read(png_of_sixteen_bits(values, transparent=values[2, 2])), expected)


def test_colour_files_whose_depth_cannot_be_read():
    apart = functools.partial(tiff_of_colour, planes=True)
    assert "stored in planes of 16 bits, which are not read. Convert it to 8 bits" in refusal(apart(deep_colour(16)))
    assert np.array_equal(read(apart(deep_colour(16), compressed=True)), deep_colour(16) >> 8)
    assert "16 bits of which the lower 12 alone are in use" in refusal(apart(deep_colour(12), compressed=True))
    assert "have 32 bits each, which Pillow does not read in a TIFF" in refusal(
        tiff_of_colour(deep_colour(16), bits=32)
    )
    plain = b"P3 4 5 65535\n" + b" ".join(b"%d" % value for value in deep_colour(14).ravel())
    assert "16 bits of which the lower" in refusal(plain)


def test_jpeg_files_of_twelve_bits():
    start, frame = b"\xff\xd8\xff\xe0\0\x04ab", struct.pack(">HHBHHB", 0xFFC1, 17, 12, 16, 16, 3)
    message = refusal(start + frame + bytes([1, 0x22, 0, 2, 0x11, 1, 3, 0x11, 1]))
    assert "its colours have 12 bits each, which Pillow does not read in a JPEG file. Convert it to 8 bits." in message


def test_one_transparent_value_of_sixteen_bits():
    deep = np.array([[40_000, 256], [40_001, 65_535]], np.uint16)
    found = read(encoded(Image.fromarray(deep), "PNG", transparency=40_000))
    assert found[..., 0].tolist() == [[255, 1], [156, 255]]


def test_tiff_files_whose_zero_is_white():
    deep = noise(6, 4, high=2**16, dtype=np.uint16)
    deep[0, 0] = 65535
    data = encoded(Image.fromarray(deep), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(read(data)[..., 0], 255 - (deep >> 8))
    shallow = encoded(Image.fromarray(noise(6, 4)), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(read(shallow), pixels(Image.open(io.BytesIO(shallow)).convert("RGB")))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1), (5, 4, 3), (5, 4, 4)])
def test_arrays_of_each_shape_and_type(shape, dtype):
    eight = noise(*shape)
    eight.flat[0] = 255
    given = {np.uint8: eight, np.uint16: eight.astype(np.uint16) * 257}.get(dtype, (eight / 255).astype(dtype))
    mode = {2: "L", 1: "L", 3: "RGB", 4: "RGBA"}[len(shape) if len(shape) == 2 else shape[2]]
    image = Image.frombytes(mode, (4, 5), eight.tobytes())
    expected = on_white(image) if mode == "RGBA" else pixels(image.convert("RGB"))
    kept = given.copy()
    assert np.array_equal(read(given), expected)
    assert np.array_equal(read(given[:, ::-1]), expected[:, ::-1])  # no block of memory
    assert np.array_equal(given, kept)


# what is refused


def refusal(source, **options) -> str:
    with pytest.raises(UnreadableImage) as caught:
        read_image(source, **options)
    assert isinstance(caught.value, UserError)
    assert isinstance(caught.value, InvalidValue)
    return str(caught.value)


@pytest.mark.parametrize(
    ("array", "cause"),
    [
        (np.zeros((5, 0, 3), np.uint8), r"the picture is empty (5 x 0 pixels)"),
        (np.zeros((0, 5), np.uint16), r"the picture is empty (0 x 5 pixels)"),
        (np.zeros((3, 32, 16), np.uint8), "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) is accepted"),
        (np.zeros(7), "is accepted"),
        (np.full((2, 2), np.nan), "NaN or infinite"),
        (np.full((2, 2), np.inf), "NaN or infinite"),
        (np.array([[-1, 5]]), "the values run from -1 to 5, and none may be negative"),
        (np.array([[-0.5, 1.0]]), "Do not normalise them"),
        (np.array([[-2.1, 2.6]]), "Do not normalise them"),
        (np.array([["a"]]), "the values are of type <U1"),
        (np.zeros((2, 2), complex), "complex128"),
    ],
)
def test_arrays_that_are_no_picture(array, cause):
    message = refusal(array, name="image 7")
    assert message.startswith("image 7: ")
    assert cause in message


@pytest.mark.parametrize("source", [None, 5, [1, 2], ["a.jpg"]])
def test_other_objects_are_no_picture(source):
    assert "is no picture. Pass a path, bytes, a Pillow image or an array." in refusal(source)


def test_an_empty_pillow_image():
    assert "the picture is empty (4 x 0 pixels)" in refusal(Image.new("RGB", (0, 4)))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12\n"


@pytest.mark.parametrize(
    ("content", "cause", "remedy"),
    [
        (b"", "the file is empty", "Replace it, or leave it out."),
        (LFS, "the file is a Git LFS pointer, not the picture itself", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "the file is a web page (HTML)", "Download it again"),
        (b"hello\n", "the file is text", "Convert it"),
        (b"%PDF-1.4", "a PDF document", "Convert it"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript document", "Convert it"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "of the HEIF family (heic)", "Convert it to JPEG"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "the file is a video (mp42)", "Convert it to JPEG"),
        (b"<?xml version='1.0'?><svg></svg>", "the file is an SVG drawing", "Convert it to PNG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture", "Convert it"),
        (b"\xff\x0a" + bytes(9), "a JPEG XL picture", "Convert it"),
        (b"\0\0\1\0\1\0" + bytes(20), "an icon", "Convert it"),
        (bytes(range(200)), "in no known picture format", "Convert it"),
        (b"\xff\xd8\xff\xe0", "damaged or cut off", "Replace it"),
        (b"\x89PNG\r\n\x1a\n", "damaged or cut off", "Replace it"),
    ],
)
def test_files_that_are_no_picture(tmp_path, content, cause, remedy):
    (tmp_path / "x.jpg").write_bytes(content)
    message = refusal(tmp_path / "x.jpg")
    assert message.startswith(f"{tmp_path / 'x.jpg'}: ")
    assert cause in message
    assert remedy in message
    with pytest.raises(UnreadableImage):
        read_size(tmp_path / "x.jpg")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files(form, share):
    data = encoded(Image.fromarray(noise(64, 48, 3)), form)
    message = refusal(data[: int(share * len(data))], name="a.img")
    assert message.startswith("a.img: the picture is damaged or cut off")


def test_places_that_are_no_file(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    assert "this is a pipe, no file" in refusal(tmp_path / "x.jpg")
    assert "this is a folder, no file" in refusal(tmp_path)
    assert "this is a device, no file" in refusal("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s.jpg"))
        assert "this is a socket, no file" in refusal(tmp_path / "s.jpg")


def test_a_missing_file_is_a_kind_of_its_own(tmp_path):
    with pytest.raises(MissingFile, match=r"a\.jpg: there is no such file"):
        read_image(tmp_path / "a.jpg")
    assert "embedded null byte" in refusal("a\0.jpg")


def test_oversized_files_are_refused_before_they_are_decoded(monkeypatch):
    data = encoded(Image.new("1", (100, 60)), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2999)
    assert "the picture is too large; at most 5,998 pixels are accepted. Make it smaller" in refusal(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 6000)
    assert read(data).shape == (60, 100, 3)


def test_messages_print_whatever_the_name_holds(tmp_path):
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xffa\n\x1b[31mb.jpg")
    Path(name).write_bytes(b"")
    message = refusal(name)
    assert r"\xffa\n\x1b[31mb.jpg: the file is empty" in message
    message.encode()
    Image.new("RGB", (2, 2)).save(name, "PNG")
    assert read(name).shape == (2, 2, 3)


def test_the_error_survives_the_way_between_processes():
    error = pickle.loads(pickle.dumps(UnreadableImage("a.jpg", "the file is empty", "Replace it.")))
    assert (error.where, error.cause, error.remedy) == ("a.jpg", "the file is empty", "Replace it.")
    assert str(error) == "a.jpg: the file is empty. Replace it."


def test_no_file_is_left_open(tmp_path, recwarn):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"x")
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read_image(tmp_path / "a.png")
        refusal(tmp_path / "b.png")
    assert set(os.listdir("/proc/self/fd")) == before
    assert not recwarn.list
