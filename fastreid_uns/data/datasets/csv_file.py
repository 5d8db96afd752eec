"""Own images with labels: a CSV manifest."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from os.path import dirname, join
from typing import NamedTuple

from fastreid_uns.data.datasets.layout import HELP, check_counts
from fastreid_uns.errors import InvalidValue, MissingFile
from fastreid_uns.registry import DATASET_REGISTRY, did_you_mean
from fastreid_uns.structures import PROTOCOLS, Record, ReIDData
from fastreid_uns.utils.paths import path_manager

COLUMNS = ("path", "identity", "camera", "split")
SPLITS = ("train", "query", "gallery")


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
    Identity and camera may be empty, or their column absent, for training images: they become -1. Numbers stay as they
    are; where one value of a column is no number, all its values are numbered 0, 1, 2, ... in sorted order, alike in
    all splits. Identity -1 is junk in query and gallery, and is dropped there.

    Args:
        path: the manifest.
        root: folder from which the image paths start; empty = the folder of the manifest.
        protocol: `cross_camera`, `plain` or `one_per_identity`; `auto` takes `cross_camera` where each query and
            gallery image has a camera and there are at least two, else `plain`.

    Raises:
        FileNotFoundError: the manifest or an image is missing.
        ValueError: the manifest does not hold what it must; the message names the line.
    """
    if protocol not in ("auto", *PROTOCOLS):
        raise InvalidValue(f"csv_file: PROTOCOL is {protocol!r}; accepted are auto, {', '.join(PROTOCOLS)}.")
    rows = [row._replace(path=join(root or dirname(path), row.path)) for row in _read(path)]
    _check(path, rows, protocol)
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


def _read(path: str) -> list[_Row]:
    if not path_manager.isfile(path):
        raise MissingFile(f"csv_file: there is no manifest {path}; PATH names a CSV file. {HELP}")
    with path_manager.open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, skipinitialspace=True)
        header = [name.strip() for name in reader.fieldnames or []]
        _check_header(path, header)
        reader.fieldnames = header
        rows = []
        for cells in reader:
            if None in cells or None in cells.values():
                raise InvalidValue(
                    f"{path}: line {reader.line_num} has another number of cells than the header ({len(header)}: "
                    f"{', '.join(header)}). Put a path that holds a comma in double quotes."
                )
            values = [(cells.get(name) or "").strip() for name in COLUMNS]
            rows.append(_Row(reader.line_num, *values))
    if not rows:
        raise InvalidValue(f"{path}: there is a header but no line below it; each image needs one. {HELP}")
    return rows


def _check_header(path: str, header: list[str]) -> None:
    absent = [name for name in COLUMNS if name not in header]
    if "path" in absent or "split" in absent:
        raise InvalidValue(
            f"{path}: line 1 has the columns {', '.join(header) or 'none'}; path and split are needed, identity and "
            f"camera are optional for training images. Write a header line."
        )
    for name in header:
        near = did_you_mean(name, absent)
        if name not in COLUMNS and near != ".":
            raise InvalidValue(f"{path}: line 1 has a column {name!r}{near} Columns are {', '.join(COLUMNS)}.")


def _check(path: str, rows: list[_Row], protocol: str) -> None:
    first: dict[tuple[str, str], int] = {}
    for row in rows:
        where = f"{path}: line {row.line}"
        if row.split not in SPLITS:
            raise InvalidValue(f"{where} has the split {row.split!r}; accepted are {', '.join(SPLITS)}.")
        earlier = first.setdefault((row.split, row.path), row.line)
        if earlier != row.line:
            raise InvalidValue(
                f"{where} lists {row.path} for {row.split} again, after line {earlier}. Remove one of them."
            )
        if row.split != "train" and not row.identity:
            raise InvalidValue(f"{where} has no identity; each {row.split} image needs one (junk: -1).")
        if row.split != "train" and protocol == "cross_camera" and row.camera in ("", "-1"):
            raise InvalidValue(f"{where} has no camera, which PROTOCOL cross_camera needs. Set PROTOCOL plain.")
        if not path_manager.isfile(row.path):
            raise MissingFile(
                f"{where}: there is no image {row.path}; paths start at the manifest's folder, or at ROOT if it is set."
            )
    present = {row.split for row in rows}
    if len(present & {"query", "gallery"}) == 1:
        lacking = next(split for split in ("query", "gallery") if split not in present)
        raise InvalidValue(f"{path}: there is no {lacking} image; a score needs query and gallery, training neither.")


def _numbers(values: Iterable[str]) -> dict[str, int]:
    """Each value as a number: its own where all are numbers, else its place in sorted order; empty and -1 give -1."""
    names = sorted(set(values) - {"", "-1"})
    if all(name.isascii() and name.isdigit() for name in names):
        return {"": -1, "-1": -1, **{name: int(name) for name in names}}
    return {"": -1, "-1": -1, **{name: place for place, name in enumerate(names)}}
