"""Images that cannot be read: how they are found, and whether they stop a run or are left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from fastreid_uns.data.decode import UnreadableImage, read_image
from fastreid_uns.errors import InvalidValue, MissingFile, UserError
from fastreid_uns.structures import Record
from fastreid_uns.utils.comm import gather_objects, rank, world
from fastreid_uns.utils.environment import cores
from fastreid_uns.utils.paths import printable
from fastreid_uns.utils.progress import progress

logger = logging.getLogger(__name__)

ON_BAD_IMAGE = ("stop", "skip")


def find_unreadable(records: Sequence[Record], threads: int = 0) -> dict[int, UserError]:
    """Position and error of each image that cannot be decoded to its last row, in order; nothing is kept.

    Several processes share the work, so all must call; each gets the whole answer.

    Args:
        records: images to read in full.
        threads: that decode at the same time; 0 = one for each processor.
    """
    mine = range(rank(), len(records), world())
    with ThreadPoolExecutor(threads or cores()) as pool:
        found = pool.map(_error_of, [records[i].path for i in mine])
        errors = dict(zip(mine, progress(found, "check images", total=len(mine)), strict=True))
    return united({i: error for i, error in errors.items() if error is not None})


def united(errors: Mapping[int, UserError]) -> dict[int, UserError]:
    """The errors that any process has found, by position; all must call."""
    return dict(sorted((pair for share in gather_objects(dict(errors)) for pair in share.items()), key=lambda p: p[0]))


def readable(records: Sequence[Record], errors: Mapping[int, UserError], *, on_bad: str, what: str) -> list[int]:
    """Positions of the images that a run may use.

    Args:
        records: of a set.
        errors: by position, of those that cannot be read.
        on_bad: `stop` raises if there is one, `skip` leaves them out with a warning.
        what: the set, as it stands in messages.

    Raises:
        ValueError: unreadable images under `stop`, or an unknown `on_bad`.
    """
    if on_bad not in ON_BAD_IMAGE:
        raise InvalidValue(
            f"INPUT.ON_BAD_IMAGE: {on_bad!r} is unknown; accepted: {', '.join(ON_BAD_IMAGE)}. Choose one of them."
        )
    if not errors:
        return list(range(len(records)))
    first = "; ".join(f"{printable(records[i].path)} ({reason(error)})" for i, error in list(errors.items())[:3])
    found = f"{what}: {len(errors):,} of {len(records):,} images cannot be read, the first: {first}."
    if on_bad == "stop":
        raise InvalidValue(
            f"{found} All must be readable. `fastreid-uns check` lists them; replace them, or leave them out with "
            f"INPUT.ON_BAD_IMAGE: skip."
        )
    if rank() == 0:
        logger.warning("%s They are left out; INPUT.ON_BAD_IMAGE: stop makes this an error.", found)
    return [i for i in range(len(records)) if i not in errors]


def check_images(records: Sequence[Record], *, on_bad: str, what: str) -> list[Record]:
    """The records whose images can be read, see `find_unreadable` and `readable`; all processes must call."""
    return [records[i] for i in readable(records, find_unreadable(records), on_bad=on_bad, what=what)]


def reason(error: UserError) -> str:
    """What is wrong with an image, without its path."""
    if isinstance(error, MissingFile):
        return "missing"
    return error.cause if isinstance(error, UnreadableImage) else str(error)


def _error_of(path: str) -> UserError | None:
    try:
        read_image(path)
    except (MissingFile, UnreadableImage) as error:
        return error
    return None
