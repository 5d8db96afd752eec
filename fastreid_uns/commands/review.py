"""Answer questions about the groups on a page in the browser: same or different, merge, split, undo."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastreid_uns.commands import finished
from fastreid_uns.utils.places import path_of

if TYPE_CHECKING:
    from fastreid_uns.photos.store import PhotoRun


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `review`."""
    parser = argparse.ArgumentParser(prog="fastreid-uns review", description=__doc__)
    parser.add_argument("output", type=path_of, metavar="OUT", help="folder that `group` wrote")
    parser.add_argument("--port", type=int, default=0, help="of this computer (default: a free one)")
    parser.add_argument("--no-browser", action="store_true", help="only print the address")
    return parser.parse_args(arguments)


def show(
    run: PhotoRun,
    *,
    identify: Callable[[bytes], dict[str, Any]] | None = None,
    port: int = 0,
    browser: bool = True,
) -> None:
    """Serve the page until Ctrl-C; then say what the answers tell."""
    from fastreid_uns.photos.questions import Question, doubtful_pairs
    from fastreid_uns.photos.review import Review
    from fastreid_uns.photos.server import Server
    from fastreid_uns.photos.verdict import questions

    def asked() -> list[Question]:
        kept = run.questions()
        moving = [Question(*pair) for pair in kept] if kept is not None else doubtful_pairs(run.groups())
        return questions(run, moving)

    server = Server(Review(run, asked), identify, port)
    print(f"{server.address}\nThis address works on this computer only. Ctrl-C ends.", flush=True)
    if browser and (sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        webbrowser.open(server.address)
    with _ctrl_c_ends_the_server_only():
        server.run()


@contextlib.contextmanager
def _ctrl_c_ends_the_server_only() -> Iterator[None]:
    """The server raises its signal again when it has ended; what comes then is not to be interrupted by it."""
    before, wakes = signal.signal(signal.SIGINT, lambda *_: None), signal.set_wakeup_fd(-1)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakes)
        signal.signal(signal.SIGINT, before)


def conclude(run: PhotoRun) -> None:
    """What the answers tell, in the report as well, and the next command."""
    from fastreid_uns.photos.road import finish

    with run.locked():
        finish(run)
    about = run.about
    for line in (about["audit"]["advice"], about["audit"]["statement"]):
        if line:
            print(line)
    print(f"next:     fastreid-uns group --resume {shlex.quote(str(run.folder))}   (groups again under your answers)")


def run(given: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C; then, if there are new answers, say what they change."""
    from fastreid_uns.photos.store import PhotoRun

    folder = PhotoRun(given.output)
    answered = _answers(folder)
    show(folder, port=given.port, browser=not given.no_browser)
    if _answers(folder) != answered:
        conclude(folder)


def _answers(run: PhotoRun) -> int:
    from fastreid_uns.photos.decisions import Decisions

    return Decisions(run.folder / "decisions.csv").size()


def main(arguments: Sequence[str] | None = None) -> int:
    """See `commands.main`."""
    given = parse_arguments(arguments)
    kept = f"stopped: all answers are kept in {given.output}; the same command goes on with them."
    return finished(run, given, last_line=lambda: kept)
