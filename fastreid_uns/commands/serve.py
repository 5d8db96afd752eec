"""The review page, and `identify` over HTTP: POST the bytes of an image to ADDRESS/identify with the token."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

from fastreid_uns.commands import finished
from fastreid_uns.utils.places import path_of


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line of `serve`."""
    parser = argparse.ArgumentParser(
        prog="fastreid-uns serve",
        description=__doc__,
        epilog="example: curl --data-binary @photo.jpg -H 'X-Token: TOKEN' http://127.0.0.1:8000/identify",
    )
    parser.add_argument("output", type=path_of, metavar="OUT", help="folder that `group` wrote")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="of this computer (default: a free one)")
    return parser.parse_args(arguments)


def run(given: argparse.Namespace) -> None:
    """Serve the page and `identify` until Ctrl-C."""
    from fastreid_uns.commands.review import show
    from fastreid_uns.photos.store import PhotoRun

    folder = PhotoRun(given.output)
    known = _Newest(folder, given.device)
    show(folder, identify=known.identify, port=given.port, browser=False)


class _Newest:
    """Identifies by the newest groups of a run; the index is read when it is first needed, and when it has changed."""

    def __init__(self, run: Any, device: str) -> None:
        self._load = functools.lru_cache(maxsize=1)(self._read)
        self.run, self.device = run, device

    def identify(self, content: bytes) -> dict[str, Any]:
        """See `Known.identify_bytes`."""
        return self._load(self.run.version).identify_bytes(content)

    def _read(self, version: int) -> Any:
        from fastreid_uns.photos.known import Known

        return Known(self.run, self.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """See `commands.main`."""
    given = parse_arguments(arguments)
    kept = f"stopped: all answers are kept in {given.output}; the same command goes on with them."
    return finished(run, given, last_line=lambda: kept)
