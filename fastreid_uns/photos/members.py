"""The photos of a run and the groups that they belong to: the rows of groups.csv."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from fastreid_uns.errors import InvalidValue
from fastreid_uns.photos.rows import decode_rows, encode_row

HEADER = ("path", "group", "confidence", "nearest", "similarity")


class Member(NamedTuple):
    """One photo and the group that it belongs to: a row of groups.csv."""

    path: str
    group: int
    confidence: float  # 0 to 1 that the photo belongs to its group
    nearest: int | None = None  # the nearest other group
    similarity: float | None = None  # cosine to it


def read_groups(file: Path) -> list[Member]:
    """Rows of a groups.csv.

    Raises:
        InvalidValue: header or row cannot be read; the message names the row (from 1, after the header).
    """
    members: list[Member] = []
    try:
        rows = decode_rows(file.read_bytes())
        if tuple(next(rows, ())) != HEADER:
            raise ValueError(f"the header is not {','.join(HEADER)}")
        for values in rows:
            members.append(_member(values))
    except (ValueError, csv.Error) as error:
        raise InvalidValue(
            f"{file}: row {len(members) + 1} cannot be read: {error}. Mend the row, or take the file from history/."
        ) from error
    return members


def _member(values: Sequence[str]) -> Member:
    if len(values) != len(HEADER):
        raise ValueError(f"{len(values)} fields were found, {len(HEADER)} are accepted")
    path, group, confidence, nearest, similarity = values
    number, certain = int(group), float(confidence)
    if number < 1 or not 0 <= certain <= 1:
        raise ValueError(f"group {group}, confidence {confidence}: numbers from 1 and 0 to 1 are accepted")
    return Member(
        path,
        number,
        certain,
        int(nearest) if nearest else None,
        float(similarity) if similarity else None,
    )


def groups_text(members: Iterable[Member]) -> bytes:
    """Content of a groups.csv.

    Raises:
        InvalidValue: a number is below 1, or a confidence outside of 0..1.
    """
    rows = [encode_row(HEADER)]
    for path, group, confidence, nearest, similarity in members:
        if group < 1 or not 0 <= confidence <= 1:
            raise InvalidValue(
                f"groups: {path!r} has group {group} and confidence {confidence}; numbers from 1 and a confidence "
                f"from 0 to 1 are accepted."
            )
        near = ("", "") if nearest is None or similarity is None else (nearest, f"{similarity:.3f}")
        rows.append(encode_row((path, group, f"{confidence:.2f}", *near)))
    return b"".join(rows)
