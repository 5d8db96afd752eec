"""What a data set holds, printed: layout, counts, cameras, matches, sizes, equal and unreadable files."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from os.path import abspath, commonpath, dirname, relpath, sep

from tabulate import tabulate

from fastreid_uns.data.datasets.layout import count, known_counts, splits
from fastreid_uns.data.datasets.own_matches import own_matches
from fastreid_uns.data.decode import read_size
from fastreid_uns.errors import UserError
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import Record, ReIDData
from fastreid_uns.utils.paths import path_manager, printable
from fastreid_uns.utils.progress import progress

SPLITS = ("train", "query", "gallery")
SHOWN = 12  # lines of a listing that may be long and holds no fault


def show_set(data: ReIDData, name: str, given: dict[str, object], quick: bool) -> bool:
    """Print all of it.

    Args:
        name: of the data set, for the counts that were published.
        given: the keywords of its function.
        quick: open no image.

    Returns:
        Whether an image is missing or (unless `quick`) unreadable.
    """
    show_layout(data)
    show_counts(data, name, given)
    show_cameras(data)
    show_matches(data, quick)
    records = list({record.path: record for part in data[:3] for record in part}.values())
    faults = find_faults(records, quick)
    if not quick:
        show_files(data)
    verb = "missing" if quick else "missing or unreadable"
    print(f"\n{len(faults):,} of {len(records):,} images are {verb}{':' if faults else ''}")
    for path, reason in faults:
        print(f"  {printable(path)}: {printable(reason)}")
    return bool(faults)


def show(title: str, rows: Iterable[Sequence[object]], headers: Sequence[str]) -> None:
    print(f"\n{title}\n" + tabulate(rows, headers, tablefmt="simple", intfmt=",", missingval="-"))


def show_layout(data: ReIDData) -> None:
    """Folders that the images come from, one level below what all have in common."""
    places = {dirname(abspath(record.path)) for part in data[:3] for record in part}
    top = commonpath(places or {abspath(".")})
    folders: Counter[tuple[str, str]] = Counter()
    for name, part in zip(SPLITS, data[:3], strict=True):
        folders.update((relpath(dirname(abspath(record.path)), top).split(sep)[0], name) for record in part)
    print(f"images lie in {printable(top)}; protocol {data.protocol}")
    rows = [(printable(folder), name, images) for (folder, name), images in sorted(folders.items())]
    if len(rows) > SHOWN:
        rows = [*rows[:SHOWN], (f"{len(rows) - SHOWN:,} more", "", sum(images for *_, images in rows[SHOWN:]))]
    show("Layout", rows, ["folder", "split", "images"])


def show_counts(data: ReIDData, name: str, given: dict[str, object]) -> None:
    """Images, identities and cameras of each split, beside what was published."""
    found, known = count(data), known_counts(DATASET_REGISTRY.get(name), **given)
    wanted = splits(known) if known else [(split, (None, None)) for split in SPLITS]
    rows = [
        (split, have[0], want[0], have[1], want[1], len({r.camera for r in part if r.camera >= 0}))
        for (split, have), (_, want), part in zip(splits(found), wanted, data[:3], strict=True)
    ]
    show("Counts", rows, ["split", "images", "known", "identities", "known", "cameras"])


def show_cameras(data: ReIDData) -> None:
    """Images of each camera in each split, and how many identities it has seen."""
    by_split = [Counter(record.camera for record in part) for part in data[:3]]
    people: dict[int, set[int]] = defaultdict(set)
    for camera, identity in ((r.camera, r.identity) for part in data[:3] for r in part if r.identity >= 0):
        people[camera].add(identity)
    cameras = sorted(set().union(*by_split))
    rows = [
        ("unknown" if camera < 0 else camera, *(images[camera] for images in by_split), len(people[camera]))
        for camera in cameras
    ]
    show("Cameras", rows, ["camera", *SPLITS, "identities"])


def show_matches(data: ReIDData, quick: bool) -> None:
    """Queries that no gallery image can match, which evaluation leaves out, and those that match themselves."""
    if not data.query:
        return
    cameras: dict[int, set[object]] = defaultdict(set)
    for record in data.gallery:
        cameras[record.identity].add(record.camera)
    if data.protocol == "cross_camera":
        lost = sum(not cameras[record.identity] - {record.camera} for record in data.query)
    else:
        lost = sum(not cameras[record.identity] for record in data.query)
    print(f"\n{lost:,} of {len(data.query):,} queries have no match in the gallery under protocol {data.protocol}")
    own = {query for query, _ in own_matches(data, contents=not quick)}
    print(f"{len(own):,} of {len(data.query):,} queries are in the gallery themselves, and count as matches there")


def find_faults(records: list[Record], quick: bool) -> list[tuple[str, str]]:
    """Path and reason of images that are missing, or (unless `quick`) do not decode to the end."""
    paths = [record.path for record in records]
    if quick:
        return [(path, "missing") for path in paths if not path_manager.isfile(path)]
    from fastreid_uns.data.image_check import find_unreadable, reason

    return [(paths[i], reason(error)) for i, error in find_unreadable(records).items()]


def look(path: str) -> tuple[bytes, tuple[int, int]] | None:
    """Digest of the file and (width, height) as displayed; None where the file is no image."""
    try:
        height, width = read_size(path)
        with path_manager.open(path, "rb") as file:
            return hashlib.blake2b(file.read(), digest_size=16).digest(), (width, height)
    except (UserError, OSError):
        return None


def show_files(data: ReIDData) -> None:
    """Sizes, and files of equal content."""
    where: dict[str, set[str]] = defaultdict(set)
    for name, part in zip(SPLITS, data[:3], strict=True):
        for record in part:
            where[record.path].add(name)
    with ThreadPoolExecutor() as pool:
        seen = list(progress(pool.map(look, where), "files", len(where)))
    sizes = sorted(found[1] for found in seen if found)
    if sizes:
        rows = [(side, min(values), sorted(values)[len(values) // 2], max(values)) for side, values in both(sizes)]
        show("Sizes in pixels", rows, ["side", "smallest", "median", "largest"])
    equal: dict[bytes, list[str]] = defaultdict(list)
    for path, found in zip(where, seen, strict=True):
        if found:
            equal[found[0]].append(path)
    groups = [paths for paths in equal.values() if len(paths) > 1 or len(where[paths[0]]) > 1]
    leaks = [
        paths for paths in groups if len(parts := set().union(*(where[p] for p in paths))) > 1 and "train" in parts
    ]
    print(f"\n{len(groups):,} files occur more than once; {len(leaks):,} of them in training and in a test split")
    for paths in (leaks or groups)[:SHOWN]:
        print("  " + ", ".join(f"{printable(path)} ({'+'.join(sorted(where[path]))})" for path in paths))


def both(sizes: list[tuple[int, int]]) -> list[tuple[str, list[int]]]:
    return [("width", [width for width, _ in sizes]), ("height", [height for _, height in sizes])]
