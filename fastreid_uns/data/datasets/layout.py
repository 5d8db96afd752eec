"""The mechanics that the data sets share: layout check, one parser, one count check."""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os.path import join, split, splitext
from typing import Any, NamedTuple, TypeVar

from fastreid_uns.errors import InvalidValue, MissingFile
from fastreid_uns.structures import Record, ReIDData
from fastreid_uns.utils.paths import path_manager, printable

IMAGE_SUFFIXES = (".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
OTHER_PICTURES = re.compile(  # that must not be passed over in silence
    r"\.(3fr|arw|avif|cr2|cr3|dng|eps|gif|hei[cf]|hif|jp2|jxl|nef|orf|pef|p[gp]m|psd|raf|raw|rw2|svg|tga)"
)
HELP = "See datasets/README.md."

logger = logging.getLogger(__name__)
Load = TypeVar("Load", bound=Callable[..., ReIDData])


class PublishedCounts(NamedTuple):
    """Published counts of a data set: (images, identities) of each split, and cameras over all of them."""

    train: tuple[int, int] = (0, 0)
    query: tuple[int, int] = (0, 0)
    gallery: tuple[int, int] = (0, 0)
    cameras: int | None = None  # None = no count on record


def check_counts(
    known: PublishedCounts | Mapping[Any, PublishedCounts] | None = None, by: str = ""
) -> Callable[[Load], Load]:
    """Decorator of a data-set function: logs what was found and warns where it is not what is known.

    Args:
        known: published counts; a mapping where they depend on a keyword of the function.
        by: that keyword.
    """

    def decorate(load: Load) -> Load:
        @functools.wraps(load)
        def checked(**keywords: object) -> ReIDData:
            data = load(**keywords)
            found = count(data)
            arguments = _arguments(load, keywords)
            place = printable(arguments.get("path") or arguments.get("root"))
            parts = [f"{part} {images:,} images of {ids:,} identities" for part, (images, ids) in splits(found)]
            logger.info("%s (%s): %s; %d cameras", load.__name__, place, ", ".join(parts), found.cameras)
            _warn_of_repetition(load.__name__, data)
            differences = compare(found, known_counts(checked, **keywords))
            if differences:
                _warn_once(
                    f"{load.__name__} ({place}): {'; '.join(differences)}. A subset of your own is fine; if it should "
                    f"be the whole set, compare it with datasets/README.md."
                )
            return data

        checked.known = (known, by)  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate


def known_counts(load: Callable[..., ReIDData], **keywords: object) -> PublishedCounts | None:
    """The published counts of a data-set function called with these keywords; None where none are on record."""
    known, by = getattr(load, "known", (None, ""))
    if isinstance(known, Mapping):
        return known.get(_arguments(load, keywords)[by])
    return known


def _arguments(load: Callable[..., ReIDData], keywords: Mapping[str, object]) -> dict[str, Any]:
    bound = inspect.signature(load).bind(**keywords)
    bound.apply_defaults()
    return bound.arguments


def count(data: ReIDData) -> PublishedCounts:
    """What is there, in the form of what is known; identity -1 and camera -1 are not counted."""
    train, query, gallery = ((len(part), len({r.identity for r in part if r.identity >= 0})) for part in data[:3])
    cameras = {record.camera for part in data[:3] for record in part if record.camera >= 0}
    return PublishedCounts(train, query, gallery, len(cameras))


def splits(counts: PublishedCounts) -> list[tuple[str, tuple[int, int]]]:
    """Name and (images, identities) of the three splits."""
    return [("train", counts.train), ("query", counts.query), ("gallery", counts.gallery)]


def compare(found: PublishedCounts, known: PublishedCounts | None) -> list[str]:
    """Where counts differ, in words with both numbers; empty where they agree or nothing is known."""
    if known is None:
        return []
    differences = [
        f"{part} has {have[0]:,} images of {have[1]:,} identities, known are {want[0]:,} of {want[1]:,}"
        for (part, have), (_, want) in zip(splits(found), splits(known), strict=True)
        if have != want
    ]
    if known.cameras not in (None, found.cameras):
        differences.append(f"{found.cameras} cameras occur, known are {known.cameras}")
    return differences


def _warn_of_repetition(name: str, data: ReIDData) -> None:
    for part, records in zip(("train", "query", "gallery"), data[:3], strict=True):
        twice = [path for path, times in Counter(record.path for record in records).items() if times > 1]
        if twice:
            _warn_once(f"{name}: {part} lists {len(twice):,} images more than once, such as {printable(twice[0])}.")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def require(root: str, folders: Iterable[str] = (), files: Iterable[str] = ()) -> None:
    """Check that a data root holds these folders and files.

    Raises:
        MissingFile: the root or one of them is missing; the message says what is there.
    """
    if not path_manager.isdir(root):
        raise MissingFile(f"{root}: there is no such folder; ROOT names the folder of the data set. {HELP}")
    missing = [f"folder {name}" for name in folders if not path_manager.isdir(join(root, name))]
    missing += [f"file {name}" for name in files if not path_manager.isfile(join(root, name))]
    if missing:
        parent = split(missing[0].split(maxsplit=1)[1])[0]
        place = join(root, parent) if parent and path_manager.isdir(join(root, parent)) else root
        found = sorted(name for name in path_manager.ls(place) if not name.startswith("."))
        shown = ", ".join(found[:12]) + (f" and {len(found) - 12} more" if len(found) > 12 else "")
        raise MissingFile(
            f"{root}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; "
            f"found{f' in {parent}' if place != root else ''}: {shown or 'nothing'}. {HELP}"
        )


def is_image(name: str) -> bool:
    """Whether a file name is that of an image; hidden files are none."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def extension(name: str) -> str:
    """Of a file name, in lower case and printable; `no extension` where there is none."""
    return printable(splitext(name)[1].lower()) or "no extension"


def passed_over_text(passed_over: Mapping[str, int]) -> str:
    """Counts in words, the most frequent first: `12 .heic, 1 broken link`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in sorted(passed_over.items(), key=lambda kv: (-kv[1], kv[0])))


def has_pictures(passed_over: Iterable[str]) -> bool:
    """Whether some of these extensions are those of pictures."""
    return any(OTHER_PICTURES.fullmatch(kind) for kind in passed_over)


def tell_passed_over(place: str, passed_over: Mapping[str, int]) -> None:
    """Log what a listing leaves out; as a warning where there are pictures among it.

    Args:
        place: the folder.
        passed_over: files by extension, see `extension`.
    """
    if not passed_over:
        return
    text = f"{printable(place)}: {sum(passed_over.values()):,} passed over: {passed_over_text(passed_over)}."
    if has_pictures(passed_over):
        logger.warning("%s Pictures of these kinds are not read; convert them to JPEG or PNG to use them.", text)
    else:
        logger.info("%s", text)


def read_list(path: str, pattern: str, form: str) -> Iterator[re.Match[str]]:
    """The non-empty lines of a list file, each matched in full.

    Args:
        path: the file.
        pattern: regular expression of a line.
        form: what a line looks like, for the message.

    Raises:
        InvalidValue: a line does not match; the message names file, line number and text.
    """
    parser = re.compile(pattern)
    # bytes that are no UTF-8 stay what they are, so that they can name files
    with path_manager.open(path, encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            match = parser.fullmatch(line.strip())
            if match is None:
                raise InvalidValue(f"{path}: line {number} is {line.strip()!r}; accepted is {form}. {HELP}")
            yield match


def named_images(
    folder: str, *, example: str, cameras: Sequence[int] = (), pattern: str = r"(?P<identity>-1|\d+)_c(?P<camera>\d+)"
) -> list[Record]:
    """The images of one folder, whose names begin with identity and camera, in order of name; junk (-1) is dropped.

    Args:
        folder: where they lie; files that are no images are passed over.
        example: a name as it should be, for the message.
        cameras: the camera numbers that may occur; they become 0, 1, 2, ... Empty: those that are found, sorted.
        pattern: regular expression of the beginning of a name.

    Raises:
        MissingFile: the folder holds no image.
        InvalidValue: a name does not parse or holds another camera; the message names the file.
    """
    parser = re.compile(pattern)
    found = []
    names = [name for name in path_manager.ls(folder) if not name.startswith(".")]
    tell_passed_over(folder, Counter(extension(name) for name in names if not is_image(name)))
    for name in sorted(filter(is_image, names)):
        match = parser.match(name)
        if match is None:
            raise InvalidValue(
                f"{join(folder, name)}: the name holds no identity and camera; accepted are names such as {example}. "
                f"Move the file away."
            )
        found.append((join(folder, name), int(match["identity"]), int(match["camera"])))
    if not found:
        raise MissingFile(f"{folder}: there is no image; accepted are {', '.join(IMAGE_SUFFIXES)}. {HELP}")
    numbers = tuple(cameras) or tuple(sorted({camera for _, _, camera in found}))
    return [
        Record(path, identity, camera_index(camera, numbers, path)) for path, identity, camera in found if identity >= 0
    ]


def camera_index(number: int, cameras: Sequence[int], where: str) -> int:
    """Position of a camera number among those of a data set.

    Raises:
        InvalidValue: it is none of them; the message begins with `where`.
    """
    if number not in cameras:
        raise InvalidValue(
            f"{where}: camera {number}; the cameras of this set are {', '.join(map(str, cameras))}. {HELP}"
        )
    return cameras.index(number)


def first_exists(records: Sequence[Record], listed_in: str) -> None:
    """Check that the first image of a list lies where the list says, which tells a wrong layout at once.

    Raises:
        MissingFile: it does not.
    """
    if records and not path_manager.isfile(records[0].path):
        raise MissingFile(
            f"{records[0].path}: this image is missing although {listed_in} lists it; images and lists must belong to "
            f"one release. {HELP}"
        )


def three_folders(root: str, folders: Sequence[str], *, cameras: Sequence[int], example: str) -> ReIDData:
    """A data set whose images lie in three folders and are named as in Market-1501.

    Args:
        root: the folder of the data set.
        folders: train, query and gallery, below `root`.
        cameras: see `named_images`.
        example: see `named_images`.
    """
    require(root, folders)
    train, query, gallery = (named_images(join(root, name), cameras=cameras, example=example) for name in folders)
    return ReIDData(train, query, gallery, "cross_camera")
