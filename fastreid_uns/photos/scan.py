"""What a folder of photos holds, from names, headers and sizes; no photo is decoded."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from fastreid_uns.data.datasets.folder import list_folder
from fastreid_uns.data.datasets.layout import has_pictures, passed_over_text
from fastreid_uns.data.decode import UnreadableImage, read_size
from fastreid_uns.errors import InvalidValue, MissingFile
from fastreid_uns.photos.teller import plural
from fastreid_uns.utils.paths import printable
from fastreid_uns.utils.progress import progress

STRIDE = 32  # networks halve the sides five times
PIXELS = 224 * 224
_THREADS = 8
_SHOWN = 5  # names in a line of the summary


@dataclass(frozen=True)
class Scan:
    """The photos below a folder.

    A photo with a sound header may still be damaged further on; the pass that decodes it tells.
    """

    folder: str  # real path
    photos: list[str]  # real paths, each file once, in order of name
    names: list[str]  # of the photos: path below the folder, with `/`
    unreadable: list[tuple[str, str]]  # real path and reason, in order of name
    duplicates: list[list[str]]  # photos whose files are equal byte by byte, two or more in each group
    passed_over: Mapping[str, int] = field(default_factory=Counter)  # other files by extension
    hidden: int = 0  # hidden files and folders, not looked into
    aspect: float = 1.0  # median of width / height as displayed; 1 without photos
    size: tuple[int, int] = (224, 224)  # suggested height and width of the input
    total_bytes: int = 0  # of the photos

    def summary(self, sized: bool = True) -> list[str]:
        """A few lines for a person to read.

        Args:
            sized: name the suggested size, because it will be taken.
        """
        lines = [f"{plural(len(self.photos), 'photo')} in {printable(self.folder)} ({_bytes(self.total_bytes)})"]
        if self.photos and sized:
            height, width = self.size
            lines.append(f"median width / height {self.aspect:.2f}: input size {height} x {width} (height x width)")
        if self.duplicates:
            extra = sum(len(group) for group in self.duplicates) - len(self.duplicates)
            first = " = ".join(printable(os.path.basename(path)) for path in self.duplicates[0][:_SHOWN])
            lines.append(f"{plural(extra, 'photo')} more than once, byte by byte, such as {first}")
        if self.unreadable:
            first = "; ".join(f"{printable(path)}: {reason}" for path, reason in self.unreadable[:_SHOWN])
            more = f"; {len(self.unreadable) - _SHOWN:,} more" if len(self.unreadable) > _SHOWN else ""
            lines.append(f"{plural(len(self.unreadable), 'file')} cannot be read: {first}{more}")
        if self.passed_over:
            advice = "; convert pictures to JPEG or PNG to use them" if has_pictures(self.passed_over) else ""
            lines.append(f"passed over: {passed_over_text(self.passed_over)}{advice}")
        if self.hidden:
            lines.append(f"passed over: {self.hidden:,} hidden")
        return lines


def scan(folder: str | Path, *, pixels: int = PIXELS, threads: int = _THREADS) -> Scan:
    """List the photos below a folder, at any depth.

    Links are followed, but no file is listed twice; only regular files are opened. Output folders of this package are
    not looked into, because they hold copies and small versions of photos.

    Args:
        folder: of photos.
        pixels: about how many an input of the network may have.
        threads: that read headers and files at the same time.

    Raises:
        MissingFile: there is no such folder.
        InvalidValue: it is no folder.
    """
    root = os.path.realpath(folder)
    if not os.path.exists(root):
        raise MissingFile(f"{printable(folder)}: there is no such folder. Check the path.")
    if not os.path.isdir(root):
        raise InvalidValue(f"{printable(folder)}: this is no folder. Name the folder that holds the photos.")
    listing = list_folder(root, _is_output)
    with ThreadPoolExecutor(threads) as pool:
        looks = list(progress(pool.map(_look, listing.images.values()), "read headers", len(listing.images)))
        found = {
            name: (path, look)
            for (name, path), look in zip(listing.images.items(), looks, strict=True)
            if isinstance(look, _Header)
        }
        duplicates = _equal_files({path: header.bytes for path, header in found.values()}, pool)
    aspect = median([header.aspect for _, header in found.values()]) if found else 1.0
    return Scan(
        folder=root,
        photos=[path for path, _ in found.values()],
        names=list(found),
        unreadable=[
            (path, look) for path, look in zip(listing.images.values(), looks, strict=True) if isinstance(look, str)
        ],
        duplicates=duplicates,
        passed_over=listing.passed_over,
        hidden=listing.hidden,
        aspect=aspect,
        size=input_size(aspect, pixels),
        total_bytes=sum(header.bytes for _, header in found.values()),
    )


def input_size(aspect: float, pixels: int = PIXELS) -> tuple[int, int]:
    """Height and width of an input of about `pixels` pixels.

    Both are multiples of `STRIDE`, whose shape comes close to the given one.

    Args:
        aspect: width / height.
        pixels: about height * width.
    """
    height = math.sqrt(pixels / aspect)
    sides = [max(STRIDE, STRIDE * round(side / STRIDE)) for side in (height, height * aspect)]
    return sides[0], sides[1]


def _is_output(place: str) -> bool:
    """Whether a folder is the output folder of grouped photos."""
    return os.path.isfile(os.path.join(place, "run.json")) and os.path.isdir(os.path.join(place, "state"))


@dataclass(frozen=True)
class _Header:
    aspect: float
    bytes: int


def _look(path: str) -> _Header | str:
    """What the header says, or why it cannot be read."""
    try:
        height, width = read_size(path)
        return _Header(width / height, os.stat(path).st_size)
    except UnreadableImage as error:
        return error.cause
    except FileNotFoundError:
        return "the file has vanished"


def _equal_files(sizes: Mapping[str, int], pool: ThreadPoolExecutor) -> list[list[str]]:
    """Groups of files of equal content, in order of their first one; only files of equal size are read."""
    common = {size for size, count in Counter(sizes.values()).items() if count > 1}
    candidates = [path for path, size in sizes.items() if size in common]
    groups: dict[bytes, list[str]] = defaultdict(list)
    digests: Iterable[bytes] = progress(pool.map(_digest, candidates), "compare files", len(candidates))
    for path, digest in zip(candidates, digests, strict=True):
        if digest:
            groups[digest].append(path)
    return [group for group in groups.values() if len(group) > 1]


def _digest(path: str) -> bytes:
    """Of a file's content; empty if it cannot be read any more."""
    whole = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                whole.update(chunk)
    except OSError:
        return b""
    return whole.digest()


def _bytes(number: int) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000  # type: ignore[assignment]
    return f"{number:,.3g} GB"
