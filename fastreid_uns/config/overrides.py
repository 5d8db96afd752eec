"""`KEY VALUE` pairs on the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastreid_uns.config.values import Typed, cast
from fastreid_uns.errors import InvalidValue, UnknownName
from fastreid_uns.plugins import resolve_plugin

HELP = (
    "KEY VALUE pairs change any key of the config, for example: SOLVER.EPOCHS 30 MODEL.LOSSES.triplet null. "
    "KEY=VALUE is the same, and needed for a value that begins with a dash."
)


class OverridesParser(argparse.ArgumentParser):
    """Takes `KEY VALUE` pairs before, between and behind the options of a command, as `overrides`."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments; `overrides` is the list of words that belong to no option."""
        if not any(action.dest == "overrides" for action in self._actions):
            self.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="keys of the config to change")
            self.epilog = " ".join(filter(None, [self.epilog, HELP]))
        return self.parse_intermixed_args(args, namespace)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """`KEY VALUE KEY VALUE ...` or `KEY=VALUE ...` as a tree of `Typed` values.

    Raises:
        ValueError: they are no pairs, or a key is given a value and keys of its own.
    """
    words: list[str] = []
    for word in overrides:
        words += word.split("=", 1) if len(words) % 2 == 0 and "=" in word else [word]
    if len(words) % 2:
        raise InvalidValue(f"command line: key {words[-1]!r} has no value; give KEY VALUE pairs.")
    tree: dict[str, Any] = {}
    for key, value in zip(words[::2], words[1::2], strict=True):
        _place(tree, key, Typed(value))
    if "PLUGINS" in tree:
        entries = cast(tree["PLUGINS"], ["name"], "command line: PLUGINS")
        tree["PLUGINS"] = [resolve_plugin(entry, Path.cwd()) for entry in entries]
    return tree


def _place(tree: dict[str, Any], key: str, value: Typed) -> None:
    *parents, last = parts = key.split(".")
    if not all(parts):
        raise UnknownName(f"command line: the key {key!r} has an empty part; names between dots are accepted.")
    node = tree
    for i, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise InvalidValue(f"command line: {key} lies below {'.'.join(parents[: i + 1])}, which has a value too.")
    if isinstance(node.get(last), dict):
        below = ".".join([key, next(iter(node[last]))])
        raise InvalidValue(f"command line: {below} lies below {key}, which has a value too. Give one of them.")
    node[last] = value
