"""Pictures that are query and gallery image at the same time, which any features find."""

from __future__ import annotations

import filecmp
import functools
import logging
import os
from collections import defaultdict

from fastreid_uns.errors import InvalidValue
from fastreid_uns.structures import Record, ReIDData
from fastreid_uns.utils.paths import printable

logger = logging.getLogger(__name__)


def own_matches(data: ReIDData, *, contents: bool = True) -> list[tuple[str, str]]:
    """Query and gallery path of each pair of one picture that the protocol counts as a match.

    Args:
        data: query, gallery and protocol.
        contents: compare files of equal identity and size byte by byte, except under `cross_camera`; else the paths
            tell alone.
    """
    crossing = data.protocol == "cross_camera"
    gallery: dict[int, list[Record]] = defaultdict(list)
    for record in data.gallery:
        gallery[record.identity].append(record)
    size = functools.cache(_size)
    found = []
    for query in data.query:
        for other in gallery[query.identity] if query.identity >= 0 else []:
            if crossing and query.camera == other.camera:
                continue
            same = query.path == other.path
            if same or (
                contents and not crossing and size(query.path) == size(other.path) and _equal(query.path, other.path)
            ):
                found.append((query.path, other.path))
    return found


def tell_own_matches(data: ReIDData) -> None:
    """Log a warning where queries find themselves.

    Raises:
        InvalidValue: most of them do, so that a score would say nothing about features.
    """
    found = own_matches(data)
    if not found:
        return
    first, second = (printable(path) for path in found[0])
    count = len({query for query, _ in found})
    text = (
        f"evaluation: {count:,} of {len(data.query):,} queries are in the gallery themselves, such as {first}"
        f"{'' if first == second else f' = {second}'}, and protocol {data.protocol} counts them as matches: any "
        f"features find them, so that mAP and rank1 say little. Take them out of the gallery, or give the cameras "
        "and use protocol cross_camera."
    )
    if 2 * count > len(data.query):
        raise InvalidValue(text)
    logger.warning("%s", text)


def _size(path: str) -> int:
    """In bytes; -1 for a file that is not there."""
    try:
        return os.path.getsize(path)
    except OSError:
        return -1


def _equal(first: str, second: str) -> bool:
    try:
        return filecmp.cmp(first, second, shallow=False)
    except OSError:
        return False
