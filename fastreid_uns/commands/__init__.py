"""The command `fastreid-uns`: one module for each subcommand, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

COMMANDS = {
    "group": "find out which photos of a folder show the same individual",
    "review": "answer questions about the groups on a page in the browser",
    "add": "assign more photos to the groups, or to new ones",
    "identify": "say which individual a photo shows: known, new or unsure",
    "serve": "the review page and `identify` over HTTP",
    "train": "train what a config describes; --resume continues",
    "evaluate": "score a run, or given weights, on the test sets of a config",
    "search": "search a folder of images by example",
    "export": "write the encoder of a run as ONNX",
    "report": "show what a run has learned as a web page",
    "check": "check a data set: layout, counts, cameras, unreadable images",
    "compare": "train configs over seeds and print the table",
    "convert": "convert the weights of another project",
    "new-project": "write the folder of a new project",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the command line names.

    Returns:
        The exit code: 0, or what `engine.launch.run_command` says.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        from fastreid_uns import __version__

        print(__version__)
        return 0
    parser = argparse.ArgumentParser(
        prog="fastreid-uns",
        description="Unsupervised object re-identification.",
        epilog=_listing(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below; COMMAND --help tells more")
    name = parser.parse_args(words[:1]).command
    module = importlib.import_module(f"fastreid_uns.commands.{name.replace('-', '_')}")
    return module.main(words[1:])


def finished(action: Callable[..., Any], *args: Any, last_line: Callable[[], str | None] | None = None) -> int:
    """The exit code of `action(*args)`: what it returns if that is a number, else 0; see `run_command` for the rest."""
    from fastreid_uns.engine.launch import run_command

    try:
        code = run_command(action, *args, last_line=last_line)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    return code if isinstance(code, int) else 0


def _listing() -> str:
    width = max(map(len, COMMANDS))
    return "commands:\n" + "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
