"""Find out which photos of a folder show the same individual: groups, links to the photos, and a report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastreid_uns.commands import finished
from fastreid_uns.errors import InvalidValue
from fastreid_uns.utils.places import expanded, path_of

if TYPE_CHECKING:
    from fastreid_uns.photos.store import PhotoRun

EPILOG = """
The output folder gets groups.csv, groups/ with links to the photos, report.html, and the trained network.
A command that was interrupted goes on when it is typed again.
"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `group`; `output` names a folder."""
    parser = argparse.ArgumentParser(prog="fastreid-uns group", description=__doc__, epilog=EPILOG)
    parser.add_argument("photos", nargs="?", type=path_of, help="folder of photos, at any depth")
    parser.add_argument("--output", type=path_of, metavar="OUT", help="folder for the results")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="OUT",
        help="group a finished folder again under your answers; individuals keep their numbers",
    )
    parser.add_argument("--copy", action="store_true", default=None, help="copies of the photos in groups/, not links")
    parser.add_argument("--no-questions", action="store_true", help="ask nothing, for scripts")
    parser.add_argument("--no-training", action="store_true", help="group with the weights as they were published")
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="input of the network (default: from the photos)"
    )
    parser.add_argument(
        "--weights",
        type=expanded,
        metavar="NAME",
        help="imagenet (default), a network of timm, hf-hub:user/name, or a file",
    )
    parser.add_argument("--config-file", metavar="YAML", help="what network it is, for those who know")
    parser.add_argument("--device", help="auto, cpu or cuda (default: auto, unless the YAML says otherwise)")
    parser.add_argument("--seed", type=int, help="of everything that is drawn (default: 0)")
    return _folders(parser.parse_args(arguments))


def _folders(given: argparse.Namespace) -> argparse.Namespace:
    """`--resume OUT` and `--output OUT --resume` mean the same.

    Raises:
        SystemExit: no output folder is named, or two.
    """
    if isinstance(given.resume, str):
        if given.output is not None and path_of(given.resume) != given.output:
            sys.exit(f"error: --resume {given.resume} and --output {given.output} name two folders. Leave one out.")
        given.output = path_of(given.resume)
    given.resume = given.resume is not None
    if given.output is None:
        sys.exit("error: no output folder is named; say --output OUT, or --resume OUT for a finished one.")
    return given


def run(given: argparse.Namespace) -> None:
    """Group the photos and print the closing lines.

    Raises:
        InvalidValue: the input of the network is smaller than 32 pixels.
    """
    from fastreid_uns.commands.asking import ask
    from fastreid_uns.commands.terminal import Terminal
    from fastreid_uns.photos.road import group_photos
    from fastreid_uns.photos.teller import duration

    if given.size is not None and min(given.size) < 32:
        raise InvalidValue(f"--size {given.size}: height and width from 32 pixels are accepted. Raise them.")
    questions = not given.no_questions and sys.stdin.isatty() and sys.stdout.isatty()
    done = group_photos(
        given.photos,
        given.output,
        resume=given.resume,
        device=given.device,
        ask=ask if questions else None,
        teller=Terminal(),
        weights=given.weights,
        size=tuple(given.size) if given.size else None,
        training=False if given.no_training else None,
        config_file=given.config_file,
        seed=given.seed,
        copy=given.copy,
    )
    took = duration(sum(done.about["seconds"].values()))
    print("\n".join(["", f"took {took}", *summary(done)]))


def summary(done: PhotoRun) -> list[str]:
    """The closing lines: what was found, how far it can be trusted, where it is, and what comes next."""
    from fastreid_uns.photos.teller import plural

    about, sizes = done.about, Counter(member.group for member in done.groups()).values()
    several = [size for size in sizes if size > 1]
    largest = f"; the largest has {max(several):,}" if several else ""
    out = shlex.quote(str(done.folder))
    audit = about["audit"]
    lines = [audit["advice"]] if audit["advice"] else []
    lines.append(
        f"{plural(len(several), 'group')} of two and more photos{largest}; "
        f"{plural(len(sizes) - len(several), 'photo')} alone; {plural(sum(sizes), 'photo')} together"
    )
    lines.append(audit["statement"])
    lines.append(f"look at:  {done.folder / 'report.html'}, {done.folder / 'groups'}, {done.groups_file}")
    verb = "answer on" if audit["verified"] else "say how good the groups are, and mend them, on"
    lines.append(f"next:     fastreid-uns review {out}   ({verb} a page in the browser)")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """See `commands.main`."""
    given = parse_arguments(arguments)
    kept = f"stopped: what was done is kept in {given.output}; the same command goes on from there."
    return finished(run, given, last_line=lambda: kept if given.output.is_dir() else "stopped: nothing was begun.")
