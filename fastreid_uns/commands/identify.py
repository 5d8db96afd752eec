"""Say which individual a photo shows: a known one and which, a new one, or that it is unsure."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastreid_uns.commands import finished
from fastreid_uns.utils.places import path_of


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `identify`."""
    parser = argparse.ArgumentParser(prog="fastreid-uns identify", description=__doc__)
    parser.add_argument("output", type=path_of, metavar="OUT", help="folder that `group` wrote")
    parser.add_argument("photos", type=path_of, nargs="+", metavar="PHOTO", help="photos, or folders of them")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one line of JSON for each photo")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> int:
    """One line for each photo: known, new, unsure or unreadable."""
    from fastreid_uns.photos.known import Known, unreadable
    from fastreid_uns.photos.store import PhotoRun

    known = Known(PhotoRun(given.output), given.device)
    files = list(_files(given.photos))
    errors = {file: error for file in files if (error := unreadable(file))}
    sound = [file for file in files if file not in errors]
    found = dict(zip(sound, known.identify(sound), strict=True)) if sound else {}
    caveat = known.caveat()
    for file in files:
        print(_line(file, found.get(file), errors.get(file), caveat if given.json else None))
    if caveat and not given.json and any(one.kind == "unsure" for one in found.values()):
        print(caveat, file=sys.stderr)
    return 2 if errors else 0


def _files(photos: Sequence[Path]) -> Iterator[str]:
    from fastreid_uns.predictor import list_images

    for photo in photos:
        yield from list_images(photo) if photo.is_dir() else [str(photo)]


def _line(file: str, found: Any, error: str | None, caveat: str | None) -> str:
    """What is said about a photo; JSON if there is a caveat for it, which may be empty."""
    from fastreid_uns.photos.known import said
    from fastreid_uns.utils.paths import printable

    answer = {"answer": "unreadable", "error": error} if found is None else said(found, caveat or "")
    if caveat is not None:
        return json.dumps({"photo": file, **answer})
    if found is None:
        return f"unreadable  {error}"
    near = {"known": "group", "unsure": "perhaps group", "new": "nearest group"}[found.kind]
    where = f"  {near} {found.group}, similarity {found.similarity:.2f}" if found.group >= 0 else ""
    return f"{found.kind:7}  {printable(file)}{where}"


def main(arguments: Sequence[str] | None = None) -> int:
    """See `commands.main`."""
    return finished(run, parse_arguments(arguments))
