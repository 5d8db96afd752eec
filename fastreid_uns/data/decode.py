"""Files, bytes, Pillow images and arrays as RGB pixels of 8 bits: what a viewer shows.

Every part that looks at a picture reads it here.

* Orientation: the tag of the camera (EXIF or XMP) is applied; a damaged tag counts as none.
* Transparency: composed on white, for alpha channels, palettes and single transparent colours.
* Grey, palette, CMYK, YCbCr, Lab and 1-bit pictures: as Pillow converts them to RGB.
* Colour profile of an RGB or CMYK picture: converted to sRGB; one that calls itself sRGB or is damaged changes nothing.
* Several frames or pages: the first one.
* More than 8 bits, or floating point: `depth.to_eight_bits` says by which rule, for grey and colour alike.

An 8-bit RGB JPEG without an orientation tag keeps its pixels bit for bit.
"""

from __future__ import annotations

import functools
import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError, features

from fastreid_uns.data.depth import Refused, bits_not_read, colour_by_largest_value, deep_colour_file, to_eight_bits
from fastreid_uns.errors import InvalidValue, MissingFile
from fastreid_uns.utils.paths import path_manager, printable

BACKGROUND = (255, 255, 255)
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")  # none starts a program

_ORIENTATION = 0x0112  # EXIF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
_HEAD = 2**20  # bytes of a file that no format claims, which are looked at to say what it is
_REMEDY = "Replace it, or leave it out."
# what Pillow and its codecs raise for files that are no image, broken or cut off
_BROKEN = (
    OSError,
    RuntimeError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)
_SIGNATURES = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"II*\0", b"MM\0*", b"BM", b"GIF8", b"\0\0\0\x0cjP")
_HEIF = ("hei", "hev", "mif", "msf", "avi")  # how the brands of still pictures begin; others are videos
_OTHERS = {
    b"%PDF": "a PDF document",
    b"PK\x03\x04": "a ZIP archive",
    b"%!PS": "a PostScript document",
    b"8BPS": "a Photoshop document",
    b"\x1f\x8b": "a gzip archive",
    b"\xff\x0a": "a JPEG XL picture",
    b"\0\0\0\x0cJXL ": "a JPEG XL picture",
    b"\0\0\1\0": "an icon",
}


class UnreadableImage(InvalidValue):
    """A picture that cannot be read.

    Attributes:
        where: its name.
        cause: what was found, a clause without a full stop.
        remedy: what to do, a sentence.
    """

    def __init__(self, where: str, cause: str = "", remedy: str = _REMEDY) -> None:
        super().__init__(where, cause, remedy)  # all three, so that it survives the way out of a worker process
        self.where, self.cause, self.remedy = where, cause, remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}. {self.remedy}" if self.cause else self.where


def read_image(source: Any, name: str = "") -> Image.Image:
    """An RGB picture as a viewer shows it.

    Args:
        source: a path, the bytes of a file, a Pillow image, or an array of shape (H,W), (H,W,1), (H,W,3) or (H,W,4):
            grey, RGB or RGB and alpha, of any type that `depth.to_eight_bits` accepts. It is not changed.
        name: of the picture in messages, where `source` is no path.

    Returns:
        Mode RGB, loaded. It is the given image where nothing had to be done.

    Raises:
        MissingFile: the path leads nowhere.
        UnreadableImage: it is no picture, damaged, empty, too large, or its values cannot be mapped.
    """
    with _opened(source, name) as image:
        file = deep_colour_file(image)
        image.load()  # TIFF files are upright after it, and the tags of PNG may come last
        rgb = _as_rgb(colour_by_largest_value(image, file) if file else image)
        turn = _UPRIGHT.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)


def read_pixels(source: Any, size: tuple[int, int], name: str = "") -> np.ndarray:
    """The picture of `read_image` at one size, resized with Pillow's bicubic filter as the published recipes do.

    Args:
        source, name: see `read_image`.
        size: height and width in pixels.

    Returns:
        (3,H,W) uint8.
    """
    resized = read_image(source, name).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))


def read_size(source: Any, name: str = "") -> tuple[int, int]:
    """Height and width in pixels as a viewer shows the picture, from its header alone.

    Raises: as `read_image`, as far as the header tells.
    """
    with _opened(source, name) as image:
        width, height = image.size
        tags = getattr(image, "tag_v2", None)
        if tags is not None:  # Pillow may have exchanged the sides already
            width, height = int(tags[256]), int(tags[257])
        return (width, height) if _orientation(image, header_only=True) >= 5 else (height, width)


@contextmanager
def _opened(source: Any, name: str) -> Iterator[Image.Image]:
    """A Pillow image of the source, header read; what goes wrong under it is told with the name of the picture."""
    try:
        if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)):
            with _stream(source) as stream, _identified(stream) as image:
                yield image
        elif isinstance(source, np.ndarray):
            yield _from_array(source)
        elif isinstance(source, Image.Image):
            _check_sides(*source.size)
            yield source
        else:
            raise Refused(f"{_kind(source)} is no picture", "Pass a path, bytes, a Pillow image or an array.")
    except FileNotFoundError:
        raise MissingFile(f"{_where(source, name)}: there is no such file. Check the path.") from None
    except _BROKEN as error:
        raise UnreadableImage(_where(source, name), *_cause(error)) from error


def _identified(stream: io.BufferedReader) -> Image.Image:
    """The picture of a file, header read; what is none is refused with what it is instead."""
    try:
        return Image.open(stream, formats=_formats())
    except UnidentifiedImageError:
        stream.seek(0)
        head = stream.read(_HEAD)
        raise Refused(*(bits_not_read(head) or _what_instead(head[:64]))) from None


def _where(source: object, name: str) -> str:
    return (
        printable(source) if isinstance(source, (str, os.PathLike)) else name or f"a picture given as {_kind(source)}"
    )


def _kind(source: object) -> str:
    return (
        f"an array {source.shape}" if isinstance(source, np.ndarray) else f"an object of type {type(source).__name__}"
    )


def _stream(source: str | os.PathLike[str] | bytes | bytearray | memoryview) -> io.BufferedReader:
    if not isinstance(source, (str, os.PathLike)):
        return io.BufferedReader(io.BytesIO(source))
    local = path_manager.get_local_path(os.fspath(source))
    mode = os.stat(local).st_mode
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise Refused(f"this is {_KINDS.get(stat.S_IFMT(mode), 'a device')}, no file", _REMEDY)
    return open(local, "rb")


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in (3, 4)):
        raise Refused(f"an array {array.shape}; (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) is accepted", "Reshape it.")
    _check_sides(array.shape[1], array.shape[0])
    return Image.fromarray(np.ascontiguousarray(to_eight_bits(array)))


def _check_sides(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise Refused(f"the picture is empty ({height} x {width} pixels)", "Leave it out, or crop it again.")


def _as_rgb(image: Image.Image) -> Image.Image:
    """Loaded pixels in RGB, not yet upright."""
    if image.mode in _DEEP_MODES:
        return _deep_as_rgb(image)
    if _is_transparent(image):
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        info = image.info
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image)
        image.info = info
    return _in_srgb(image, "CMYK") if image.mode == "CMYK" else _in_srgb(image, "RGB")


def _in_srgb(image: Image.Image, space: str) -> Image.Image:
    """In RGB, by the profile of the picture where it is one of that colour space."""
    profile = image.info.get("icc_profile")
    transform = _to_srgb(profile, space) if isinstance(profile, bytes) else None
    if transform is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    return transform.apply(image if image.mode == space else image.convert(space))


@functools.lru_cache(maxsize=16)
def _to_srgb(profile: bytes, space: str) -> Any:
    if not features.check("littlecms2"):
        return None
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        about = given.profile
        if about.xcolor_space.strip() != space or "srgb" in (about.profile_description or "").lower():
            return None
        return ImageCms.buildTransform(given, ImageCms.createProfile("sRGB"), space, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def _deep_as_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    gray = to_eight_bits(values)
    if getattr(image, "tag_v2", {}).get(262) == 0:  # TIFF, 0 is white: Pillow heeds it up to 8 bits
        gray = 255 - gray
    if isinstance(key := image.info.get("transparency"), int):  # PNG: one value is transparent
        gray = np.where(values == key, np.uint8(BACKGROUND[0]), gray)
    return Image.fromarray(gray).convert("RGB")


def _is_transparent(image: Image.Image) -> bool:
    if image.mode in _ALPHA_MODES or (image.mode == "P" and image.palette and image.palette.mode.endswith("A")):
        return True
    return image.mode in ("P", "RGB", "L", "1") and image.info.get("transparency") is not None


def _orientation(image: Image.Image, header_only: bool = False) -> int:
    """1 to 8, as EXIF numbers them."""
    try:
        tags = Image.Image.getexif(image) if header_only else image.getexif()
        value = tags.get(_ORIENTATION, 1)
    except _BROKEN:
        return 1
    return value if value in _UPRIGHT else 1


def _cause(error: BaseException) -> tuple[str, str]:
    """What to say of an error: cause and remedy."""
    if isinstance(error, Refused):
        return error.args[0], error.args[1]
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"the picture is too large; at most {most:,} pixels are accepted", "Make it smaller, or leave it out."
    if isinstance(error, OSError) and error.strerror:
        return f"the file cannot be read ({error.strerror})", _REMEDY
    return f"the picture is damaged or cut off ({str(error) or type(error).__name__})", _REMEDY


def _what_instead(head: bytes) -> tuple[str, str]:
    """What a file is that no picture format claims, judged by its first bytes."""
    text = head.lstrip().lower()
    if not head:
        return "the file is empty", _REMEDY
    if head.startswith(b"version https://git-lfs"):
        return "the file is a Git LFS pointer, not the picture itself", "Fetch the pictures with git lfs pull."
    if text.startswith((b"<!doctype html", b"<html")):
        return "the file is a web page (HTML), no picture", "Download it again, or leave it out."
    if head[4:8] == b"ftyp":
        brand = head[8:12].decode("ascii", "replace")
        kind = "of the HEIF family" if brand.lower().startswith(_HEIF) else "a video"
        return f"the file is {kind} ({printable(brand)}), which is not read", "Convert it to JPEG or PNG."
    if head.startswith(_SIGNATURES):
        return "the picture is damaged or cut off, or of a variant that Pillow does not know", _REMEDY
    if b"<svg" in text:
        return "the file is an SVG drawing, which is not read", "Convert it to PNG."
    kind = next((what for start, what in _OTHERS.items() if head.startswith(start)), "")
    if not kind and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        kind = "text"
    formats = ", ".join(_formats())
    return f"the file is {kind or 'in no known picture format'}; accepted are {formats}", "Convert it, or leave it out."
