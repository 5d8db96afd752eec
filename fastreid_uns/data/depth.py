"""Values of any depth as 8 bits, by one rule for arrays, grey files and colour files."""

from __future__ import annotations

import io
import re
import struct
import sys
from typing import Any

import numpy as np
from PIL import Image

_LAYOUT = re.compile(r"((?:RGB|RGBX|RGBA);16)([BLN])")  # of files of which either byte of each value can be had
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_BITS, _PLANES = 258, 284  # tags of TIFF
_CONVERT = "Convert it to 8 bits."


class Refused(ValueError):
    """Cause and remedy, where the name is not known."""


def to_eight_bits(values: np.ndarray) -> np.ndarray:
    """Values of any depth as uint8; the largest one of the picture decides what they mean.

    | type | largest value | read as | becomes |
    |---|---|---|---|
    | bool | | off, on | 0, 255 |
    | integer | up to 255 | 8 bits | the value |
    | integer | up to 4095 | 12 bits (many cameras write them into files of 16) | value >> 4 |
    | integer | up to 16383 | 14 bits (thermal cameras, raw data) | value >> 6 |
    | integer | up to 65535 | 16 bits | value >> 8, as Pillow reads colour pictures of 16 bits |
    | integer | above | as many bits as it takes | the upper 8 |
    | floating point | up to 1.1 | 0..1 | rounded value * 255 |
    | floating point | up to 280 | 0..255 | the rounded value |
    | floating point | above | as integers | as integers |

    Floating-point values may overshoot by a tenth at either end, as resizing filters do; they are clipped.

    Args:
        values: any shape, at least one value.

    Raises:
        ValueError: negative values, NaN or infinite ones, or a type that is no number.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise Refused(f"the values are of type {values.dtype}", "Pass integers, floating-point numbers or booleans.")
    real = values.dtype.kind == "f"
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise Refused("some values are NaN or infinite", "Replace them by numbers, or leave it out.")
    top = 1.0 if real and high <= 1.1 else 255.0
    if low < (-0.1 * max(1.0, high) if real else 0):
        raise Refused(
            f"the values run from {low:.4g} to {high:.4g}, and none may be negative",
            "Do not normalise them; map them to 0..1 or 0..255.",
        )
    if high <= (1.1 * top if real else 255):
        return np.rint(np.clip(values * (255 / top) if real else values, 0, 255)).astype(np.uint8)
    bits = next((depth for depth in (12, 14, 16) if high < 2**depth), int(high).bit_length())
    return (np.clip(values, 0, None) // 2 ** (bits - 8)).astype(np.uint8)


def deep_colour_file(image: Any) -> bytes | None:
    """The file of a colour picture of 16 bits that is not loaded yet; None for all others.

    Raises:
        ValueError: it has planes of 16 bits without compression, of which Pillow gives wrong pixels.
    """
    stream = getattr(image, "fp", None)
    if stream is not None and _is_planar(image) and image.tile and image.tile[0][0] == "raw":
        raise Refused("its values are stored in planes of 16 bits, which are not read", _CONVERT)
    if stream is None or image.mode not in ("RGB", "RGBA", "LA"):
        return None
    if not any(";16" in _raw_mode(tile) or _largest(tile) == 65535 for tile in image.tile):
        return None
    place = stream.tell()
    stream.seek(0)
    content = stream.read()
    stream.seek(place)
    return content


def colour_by_largest_value(image: Image.Image, file: bytes) -> Image.Image:
    """A colour picture of 16 bits as `to_eight_bits` reads its values; alpha counts by itself.

    Args:
        image: loaded; Pillow has given the upper 8 bits.
        file: of `deep_colour_file`.

    Raises:
        ValueError: its values have 14 bits or fewer, and the lower ones cannot be had.
    """
    top = int(np.max(image.convert("RGB").getextrema()))
    key = image.info.get("transparency")  # PNG: one colour of 16 bits is transparent
    if top > 2**6 and key is None:
        return image  # more than 14 bits are in use
    values = _all_bits(image, file, top)
    parts = [to_eight_bits(values[..., :3])]
    if values.shape[2] == 4:
        parts.append(to_eight_bits(values[..., 3:]))
    elif isinstance(key, tuple):
        parts.append(np.where((values == key).all(2, keepdims=True), np.uint8(0), np.uint8(255)))
    eight = Image.fromarray(np.concatenate(parts, axis=2))
    eight.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return eight


def _all_bits(image: Image.Image, file: bytes, top: int) -> np.ndarray:
    """(H,W,3) or (H,W,4) uint16; `top` is the largest of the upper 8 bits."""
    again: Any = Image.open(io.BytesIO(file), formats=[str(image.format)])
    codec, _, offset, _ = again.tile[0]
    if codec == "ppm":
        values = np.frombuffer(file, ">u2", 3 * again.width * again.height, offset)
        return values.reshape(again.height, again.width, 3).astype(np.uint16)
    if _raw_mode(again.tile[0]) == "LA;16B":  # four bytes a pixel, which are taken as they are
        again.tile = [_with_raw_mode(tile, "RGBA") for tile in again.tile]
        return np.ascontiguousarray(np.asarray(again)).view(">u2")[..., [0, 0, 0, 1]].astype(np.uint16)
    layouts = [_LAYOUT.fullmatch(_raw_mode(tile)) for tile in again.tile]
    if _is_planar(again) or not all(layouts):
        raise Refused(
            f"its colours have 16 bits of which the lower {8 + top.bit_length()} alone are in use, and only the upper "
            f"8 are read",
            _CONVERT,
        )
    again.tile = [
        _with_raw_mode(tile, layout[1] + _OTHER_BYTE[layout[2]])
        for tile, layout in zip(again.tile, layouts, strict=True)
        if layout
    ]
    again.load()
    return np.asarray(image).astype(np.uint16) << 8 | np.asarray(again)


def _raw_mode(tile: Any) -> str:
    """How the bytes of a part of a file are read, such as `RGB;16B`."""
    args = tile[3]
    return str(args if isinstance(args, str) else args[0])


def _with_raw_mode(tile: Any, mode: str) -> Any:
    args = mode if isinstance(tile[3], str) else (mode, *tile[3][1:])
    return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)  # plain tuples before Pillow 11


def _largest(tile: Any) -> int:
    """The value of PPM files that counts as white; 0 for others."""
    return int(tile[3][-1]) if tile[0].startswith("ppm") else 0


def _is_planar(image: Any) -> bool:
    """Whether a TIFF file of more than 8 bits has a plane for each colour."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(_PLANES) == 2 and max(tags.get(_BITS, (8,))) > 8


def bits_not_read(head: bytes) -> tuple[str, str] | None:
    """Cause and remedy for a JPEG or TIFF file that Pillow refuses for its depth; None for all others.

    Args:
        head: the first bytes of the file.
    """
    bits = _bits_of_jpeg(head) if head.startswith(b"\xff\xd8") else _bits_of_tiff(head)
    if bits == 8:
        return None
    form = "JPEG" if head.startswith(b"\xff\xd8") else "TIFF"
    return f"its colours have {bits} bits each, which Pillow does not read in a {form} file", _CONVERT


def _bits_of_jpeg(head: bytes) -> int:
    """What the frame header says; 8 where there is none."""
    place = 2
    while head[place : place + 1] == b"\xff" and place + 5 <= len(head):
        marker, length = head[place + 1], int.from_bytes(head[place + 2 : place + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return head[place + 4]
        place += 2 + length
    return 8


def _bits_of_tiff(head: bytes) -> int:
    """What the first directory says; 8 where there is none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(head[:4])
    if order is None:
        return 8
    try:
        (start,) = struct.unpack_from(f"{order}I", head, 4)
        (entries,) = struct.unpack_from(f"{order}H", head, start)
        for place in range(start + 2, start + 2 + 12 * entries, 12):
            tag, _, count = struct.unpack_from(f"{order}HHI", head, place)
            if tag == _BITS:
                (values,) = (place + 8,) if count <= 2 else struct.unpack_from(f"{order}I", head, place + 8)
                return max(struct.unpack_from(f"{order}{min(count, 8)}H", head, values))
    except struct.error:
        pass
    return 8
