"""Assign more photos to the groups that are known, or to new ones; numbers stay, earlier groups are kept as history."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastreid_uns.commands import finished
from fastreid_uns.utils.places import path_of


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `add`."""
    parser = argparse.ArgumentParser(prog="fastreid-uns add", description=__doc__)
    parser.add_argument("output", type=path_of, metavar="OUT", help="folder that `group` wrote")
    parser.add_argument("photos", type=path_of, metavar="MORE_PHOTOS", help="folder of further photos")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    """Add the photos and print what became of them."""
    from fastreid_uns.commands.group import summary
    from fastreid_uns.commands.terminal import Terminal
    from fastreid_uns.photos.addition import add_photos
    from fastreid_uns.photos.store import PhotoRun
    from fastreid_uns.photos.teller import plural

    folder = PhotoRun(given.output)
    done = add_photos(folder, given.photos, Terminal(), device=given.device)
    print(
        f"\n{plural(done.photos, 'photo')} added: {done.joined:,} to {plural(done.groups, 'known group')}, "
        f"{done.photos - done.joined:,} to {plural(done.founded, 'new group')}"
    )
    print("\n".join(summary(folder)))


def main(arguments: Sequence[str] | None = None) -> int:
    """See `commands.main`."""
    given = parse_arguments(arguments)
    return finished(run, given, last_line=lambda: f"stopped: the groups in {given.output} are as they were.")
