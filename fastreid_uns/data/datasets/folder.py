"""Own images without labels: every image below a folder."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from os.path import join, realpath
from typing import NamedTuple

from fastreid_uns.data.datasets.layout import (
    HELP,
    IMAGE_SUFFIXES,
    check_counts,
    extension,
    is_image,
    require,
    tell_passed_over,
)
from fastreid_uns.errors import MissingFile
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import Record, ReIDData
from fastreid_uns.utils.paths import path_manager, printable


class Listing(NamedTuple):
    """What lies below a folder."""

    images: dict[str, str]  # name below the folder, with `/`, in sorted order → real path; each file once
    passed_over: Counter[str]  # other files by extension, and what is no file by its kind
    hidden: int  # hidden files and folders; the latter are not looked into


@DATASET_REGISTRY.register()
@check_counts()
def folder(*, root: str) -> ReIDData:
    """All images below a folder, at any depth, as a training set in order of path; identity and camera are -1.

    Each file is listed once, whatever links lead to it; links to files and folders elsewhere are followed. Hidden
    files and folders and `__MACOSX` are passed over; query and gallery are empty.

    Args:
        root: the folder.

    Raises:
        MissingFile: there is no such folder, or no image below it.
    """
    require(root)
    found = list_folder(root)
    tell_passed_over(root, found.passed_over)
    if not found.images:
        raise MissingFile(
            f"{printable(root)}: there is no image below this folder; accepted are {', '.join(IMAGE_SUFFIXES)}. {HELP}"
        )
    return ReIDData([Record(join(root, name), -1, -1) for name in found.images], [], [], "plain")


def list_folder(root: str, leave_out: Callable[[str], bool] = lambda place: False) -> Listing:
    """The images at any depth below a folder; no file is opened.

    A file that several links lead to has its name without a link, or else the first one in sorted order. Two names of
    one file that are not links (hard links) are two files.

    Args:
        root: the folder.
        leave_out: real path of a folder below it → whether it is not to be looked into, which is counted.
    """
    found: dict[str, str] = {}  # real path → name
    links: list[str] = []
    passed_over: Counter[str] = Counter()
    hidden = 0
    for name, entry in _entries(path_manager.get_local_path(root), passed_over, leave_out):
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            hidden += 1
        elif not _is_file(entry):
            passed_over["broken link" if entry.is_symlink() else "pipe, socket or device"] += 1
        elif not is_image(entry.name):
            passed_over[extension(entry.name)] += 1
        elif entry.is_symlink():
            links.append(name)
        else:
            found.setdefault(entry.path, name)
    for name in sorted(links):
        found.setdefault(realpath(join(root, name)), name)
    return Listing({name: path for path, name in sorted(found.items(), key=lambda item: item[1])}, passed_over, hidden)


def _entries(
    root: str, passed_over: Counter[str], leave_out: Callable[[str], bool]
) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Name below the root and entry (of a real path) of all that is no folder to look into; each folder once."""
    folders, links, seen = [("", realpath(root))], list[tuple[str, str]](), set()
    while folders or links:
        # links last, so that what lies below the root has its own name
        folder_name, place = folders.pop() if folders else heappop(links)
        if place in seen:
            continue
        seen.add(place)
        if folder_name and leave_out(place):
            passed_over["output folder"] += 1
            continue
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
        except OSError:
            passed_over["folder that cannot be read"] += 1
            continue
        for entry in entries:
            name = f"{folder_name}/{entry.name}".lstrip("/")
            if entry.name.startswith(".") or entry.name == "__MACOSX" or not _is_folder(entry):
                yield name, entry
            elif entry.is_symlink():
                heappush(links, (name, realpath(entry.path)))
            else:
                folders.append((name, entry.path))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
