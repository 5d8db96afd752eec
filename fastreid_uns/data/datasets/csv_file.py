"""Own images with labels: a CSV manifest."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import re
import unicodedata
from collections.abc import Iterable
from os.path import dirname, join, realpath
from typing import NamedTuple

from fastreid_uns.data.datasets.layout import HELP, check_counts
from fastreid_uns.errors import InvalidValue, MissingFile
from fastreid_uns.registry import DATASET_REGISTRY, did_you_mean
from fastreid_uns.structures import PROTOCOLS, Record, ReIDData
from fastreid_uns.utils.file_kind import known_kind
from fastreid_uns.utils.paths import path_manager, printable

COLUMNS = ("path", "identity", "camera", "split")
SPLITS = ("train", "query", "gallery")
_OTHER_NAMES = {  # of columns in the tables of other projects
    "identity": ("pid", "id", "label", "person", "person_id", "vehicle_id", "individual", "individual_id", "class"),
    "camera": ("cam", "camid", "cam_id", "camera_id", "cameraid"),
}
ABSENT = ("", "nan", "NaN", "NA", "N/A", "n/a", "<NA>", "#N/A", "None", "null", "NULL")  # as pandas reads them

logger = logging.getLogger(__name__)


class _Row(NamedTuple):
    line: int
    path: str
    identity: str
    camera: str
    split: str


@DATASET_REGISTRY.register()
@check_counts()
def csv_file(*, path: str, root: str = "", protocol: str = "auto") -> ReIDData:
    """The images that a manifest lists, in its order.

    Columns are `path`, `split` (train, query or gallery), `identity` and `camera`; further columns are passed over.
    Commas, semicolons or tabs separate them. Identity and camera may be empty or NaN, or their column absent, for
    training images: they become -1. Numbers stay as they are, 3.0 is 3; where one value of a column is no number, or
    where two are equal as numbers only (1 and 01), all its values are numbered 0, 1, 2, ... in sorted order, alike in
    all splits. Words that look alike are one, apart from upper and lower case. Identity -1 is junk in query and
    gallery, and is dropped there; camera -1 is unknown.

    Args:
        path: the manifest, in UTF-8; UTF-16 with its mark is read as well, and all else as Windows-1252.
        root: folder from which the image paths start; empty = the folder of the manifest. Backslashes separate
            folders where no file has them in its name.
        protocol: `cross_camera`, `plain` or `one_per_identity`; `auto` takes `cross_camera` where each query and
            gallery image has a camera and there are at least two, else `plain`.

    Raises:
        MissingFile: the manifest or an image is missing.
        InvalidValue: the manifest does not hold what it must; the message names the line.
    """
    if protocol not in ("auto", *PROTOCOLS):
        raise InvalidValue(f"csv_file: PROTOCOL is {protocol!r}; accepted are auto, {', '.join(PROTOCOLS)}.")
    rows = [row._replace(path=_found(join(root or dirname(path), row.path))) for row in _read(path)]
    _check(printable(path), rows, protocol)
    identities = _numbers(row.identity for row in rows)
    cameras = _numbers(row.camera for row in rows)
    parts: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for row in rows:
        if row.split == "train" or row.identity != "-1":
            parts[row.split].append(Record(row.path, identities[row.identity], cameras[row.camera]))
    if protocol == "auto":
        seen = {record.camera for record in parts["query"] + parts["gallery"]}
        protocol = "cross_camera" if len(seen) > 1 and -1 not in seen else "plain"
    return ReIDData(parts["train"], parts["query"], parts["gallery"], protocol)


def _refuse_open_quote(where: str, line: int, cells: list[str]) -> None:
    """Say where a cell begins that takes up the lines behind it."""
    taken = sum(cell.rstrip("\r\n").count("\n") for cell in cells)
    if taken:
        raise InvalidValue(
            f"{where}: a quotation mark of line {line - taken} is not closed there and takes up the lines until "
            f"{line}. Remove it, or close it."
        )


def _read(path: str) -> list[_Row]:
    if not path_manager.isfile(path):
        raise MissingFile(f"csv_file: there is no manifest {printable(path)}; PATH names a CSV file. {HELP}")
    text, where = _text(path), printable(path)
    delimiter, skipped = _delimiter(text)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        header: list[str] = []
        rows = []
        for cells in lines:
            if lines.line_num <= skipped or not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip().lower() for cell in cells]
                _check_header(where, lines.line_num, header)
                continue
            while len(cells) > len(header) and not cells[-1].strip():
                cells.pop()
            if len(cells) != len(header):
                _refuse_open_quote(where, lines.line_num, cells)
                raise InvalidValue(
                    f"{where}: line {lines.line_num} has another number of cells than the header ({len(header)}: "
                    f"{', '.join(header)}). Put a path that holds a comma in double quotes."
                )
            rows.append(_row(lines.line_num, dict(zip(header, cells, strict=True)), delimiter))
    except csv.Error as error:
        raise InvalidValue(
            f"{where}: line {lines.line_num} is no CSV ({error}). Save the table as CSV again."
        ) from error
    if not header:
        raise InvalidValue(f"{where}: the file is empty; a header line and a line for each image are needed. {HELP}")
    if not rows:
        raise InvalidValue(f"{where}: there is a header but no line below it; each image needs one. {HELP}")
    return rows


def _text(path: str) -> str:
    with path_manager.open(path, "rb") as file:
        content = file.read()
    if content.startswith(b"PK\x03\x04"):
        raise InvalidValue(f"{printable(path)}: this is a workbook, no CSV. Save the sheet as CSV (UTF-8).")
    if kind := known_kind(content[:512]):
        raise InvalidValue(f"{printable(path)}: this is no CSV, but {kind}")
    marked = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    if not marked and b"\0" in content:
        line = content.count(b"\n", 0, content.index(b"\0")) + 1
        raise InvalidValue(
            f"{printable(path)}: line {line} holds a zero byte, as no CSV in UTF-8 does. Save the table as CSV (UTF-8)."
        )
    try:
        return content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        logger.warning(
            "%s: line %d is not UTF-8; the file is read as Windows-1252. Save it as UTF-8 if names come out wrong.",
            printable(path),
            line,
        )
        return content.decode("cp1252", "surrogateescape")


def _delimiter(text: str) -> tuple[str, int]:
    """What separates the columns, judged by the header; and the number of lines before it."""
    first = text.split("\n", 1)[0]
    if re.fullmatch(r"sep=.\r?", first):  # Excel writes and heeds it
        return first[4], 1
    header = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0].lower()
    known = {
        delimiter: sum(name.strip(" \"'") in COLUMNS for name in header.split(delimiter))
        for delimiter in (",", ";", "\t")
    }
    return max(known, key=lambda delimiter: known[delimiter]), 0


def _row(line: int, cells: dict[str, str], delimiter: str) -> _Row:
    path, identity, camera, split = (cells.get(name, "").strip() for name in COLUMNS)
    comma = delimiter != ","
    return _Row(line, path, _value(identity, comma), _value(camera, comma), split.lower())


def _value(cell: str, comma: bool) -> str:
    """Identity or camera as text, alike for what looks alike: 3.0 is 3, and with a decimal comma 3,0 as well; one
    form of a letter with an accent, and no character without width."""
    cell = unicodedata.normalize("NFC", "".join(char for char in cell if unicodedata.category(char) != "Cf")).strip()
    number = re.fullmatch(r"(-?[0-9]+)[.,]0+" if comma else r"(-?[0-9]+)\.0+", cell)
    return number[1] if number else "" if cell in ABSENT else cell


def _found(path: str) -> str:
    """The path as it is on this disk: with other separators, composed otherwise, or in bytes that are no UTF-8."""
    if path_manager.isfile(path):
        return path
    slashes = path.replace("\\", "/")
    candidates = [slashes, *(unicodedata.normalize(form, slashes) for form in ("NFC", "NFD"))]
    with contextlib.suppress(UnicodeEncodeError):  # a name that Windows-1252 does not have
        candidates.append(os.fsdecode(slashes.encode("cp1252", "surrogateescape")))
    return next((candidate for candidate in candidates if path_manager.isfile(candidate)), path)


def _check_header(where: str, line: int, header: list[str]) -> None:
    absent = [name for name in COLUMNS if name not in header]
    needed = [name for name in absent if name in ("path", "split")]
    if needed:
        raise InvalidValue(
            f"{where}: line {line} lacks the column {' and '.join(needed)}; found are "
            f"{', '.join(map(printable, header))}. path and split are needed, identity and camera are optional for "
            f"training images; write a header line."
        )
    for name, others in _OTHER_NAMES.items():
        taken = [other for other in header if other.replace(" ", "_") in others] if name in absent else []
        if taken:
            logger.warning(
                "%s: there is no column %s, so it is not known; the column %s is passed over. Rename it to %s if that "
                "is what it holds.",
                where,
                name,
                printable(taken[0]),
                name,
            )
    for name in header:
        near = did_you_mean(name, absent) if name else "."
        if name not in COLUMNS and near != ".":
            raise InvalidValue(f"{where}: line {line} has a column {name!r}{near} Columns are {', '.join(COLUMNS)}.")
        if name in COLUMNS and header.count(name) > 1:
            raise InvalidValue(f"{where}: line {line} has the column {name} twice. Remove or rename one of them.")


def _check(where: str, rows: list[_Row], protocol: str) -> None:
    first: dict[tuple[str, str], int] = {}
    for row in rows:
        _check_row(f"{where}: line {row.line}", row, protocol)
        earlier = first.setdefault((row.split, realpath(row.path)), row.line)
        if earlier != row.line:
            raise InvalidValue(
                f"{where}: line {row.line} lists {printable(row.path)} for {row.split} again, after line {earlier}. "
                f"Remove one of them."
            )
    present = {row.split for row in rows}
    if len(present & {"query", "gallery"}) == 1:
        lacking = next(split for split in ("query", "gallery") if split not in present)
        raise InvalidValue(f"{where}: there is no {lacking} image; a score needs query and gallery, training neither.")


def _check_row(where: str, row: _Row, protocol: str) -> None:
    if row.split not in SPLITS:
        raise InvalidValue(f"{where} has the split {row.split!r}; accepted are {', '.join(SPLITS)}.")
    for name, value in (("identity", row.identity), ("camera", row.camera)):
        if value != "-1" and re.fullmatch(r"-[0-9]+", value):
            meaning = "junk" if name == "identity" else "unknown"
            raise InvalidValue(f"{where} has the {name} {value}; accepted are -1 ({meaning}), 0, 1, ... and words.")
        if re.fullmatch(r"[+-]?[0-9]+([.,][0-9]+)?[eE][+-]?[0-9]+", value):
            raise InvalidValue(
                f"{where} has the {name} {value}, a number that was shortened, so that several may have become one. "
                f"Write it in full: in a spreadsheet, format the column as text before it is saved."
            )
    if row.split != "train" and not row.identity:
        raise InvalidValue(f"{where} has no identity; each {row.split} image needs one (junk: -1).")
    if row.split != "train" and protocol == "cross_camera" and row.camera in ("", "-1"):
        raise InvalidValue(f"{where} has no camera, which PROTOCOL cross_camera needs. Set PROTOCOL plain.")
    if not path_manager.isfile(row.path):
        raise MissingFile(
            f"{where}: there is no image {printable(row.path)}; paths start at the manifest's folder, or at ROOT if it "
            f"is set."
        )


def _numbers(values: Iterable[str]) -> dict[str, int]:
    """Each value as a number: its own where all are different numbers, else its place in sorted order; or -1."""
    names = sorted(set(values) - {"", "-1"})
    numbers = {int(name) for name in names if name.isascii() and name.isdigit()}
    if len(numbers) == len(names) and max(numbers, default=0) < 2**63:
        return {"": -1, "-1": -1, **{name: int(name) for name in names}}
    return {"": -1, "-1": -1, **{name: place for place, name in enumerate(names)}}
