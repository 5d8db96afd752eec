"""Small pictures of photos, each made once: the review page and the report show the same files."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import stat
from pathlib import Path

from PIL import Image, ImageDraw

from fastreid_uns.data.decode import read_image
from fastreid_uns.errors import InvalidState, UserError

EDGE = 320  # pixels of the longer side
QUALITY = 82
UNREADABLE = (214, 210, 204)


def photo_id(path: str) -> str:
    """Name of a photo in addresses: it says nothing about the disk and leads nowhere by itself."""
    return hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:20]


class Thumbnails:
    """Small JPEG files in a folder; each has the time of its photo, and a photo that was changed gets a new one.

    Args:
        folder: it is made when the first picture is.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def file(self, path: str, photo: Path) -> Path:
        """The small picture of a photo.

        Args:
            path: as in groups.csv.
            photo: the file. One that cannot be read gets a crossed-out picture.

        Raises:
            InvalidState: the picture cannot be written.
        """
        name = photo_id(path)
        file = self.folder / name[:2] / f"{name}.jpg"
        taken, made = _time(photo), _time(file, follow=False)
        if made is None or taken not in (None, made):
            _put(file, picture(photo, EDGE), taken)
        return file


def picture(photo: Path, edge: int) -> bytes:
    """A photo as a viewer shows it, as a JPEG whose longer side has at most `edge` pixels."""
    try:
        image = _read_reduced(photo, edge)
        image.thumbnail((edge, edge), Image.Resampling.LANCZOS, reducing_gap=2.0)
    except UserError:
        image = _crossed_out()
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY)
    return stream.getvalue()


def _put(file: Path, content: bytes, taken: int | None) -> None:
    """Write a file that can be made again: two threads may do so at once, and nothing waits for the disk."""
    part = file.with_name(f".{secrets.token_hex(8)}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("xb") as stream:
            stream.write(content)
        if taken is not None:
            os.utime(part, ns=(taken, taken))
        part.replace(file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InvalidState(f"{file}: the small picture could not be written ({error}). Free some space.") from error


def _read_reduced(photo: Path, edge: int) -> Image.Image:
    """The picture, at least twice as large as needed; a JPEG file is decoded at a fraction of its size."""
    if _time(photo) is not None:
        try:
            with Image.open(photo, formats=("JPEG",)) as image:
                image.draft("RGB", (2 * edge, 2 * edge))
                return read_image(image, str(photo))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            pass  # no JPEG, or a damaged one
    return read_image(photo)


def _time(file: Path, follow: bool = True) -> int | None:
    """When a regular file was changed; None if there is none."""
    try:
        found = file.stat(follow_symlinks=follow)
    except OSError:
        return None
    return found.st_mtime_ns if stat.S_ISREG(found.st_mode) else None


def _crossed_out() -> Image.Image:
    side = EDGE // 2
    image = Image.new("RGB", (side, side), UNREADABLE)
    draw = ImageDraw.Draw(image)
    for line in ((0, 0, side, side), (0, side, side, 0)):
        draw.line(line, fill=(150, 146, 140), width=3)
    return image
