"""`KEY VALUE` pairs on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastreid_uns.config.values import Typed, cast
from fastreid_uns.errors import InvalidValue, UnknownName
from fastreid_uns.plugins import resolve_plugin


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
