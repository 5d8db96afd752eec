"""YAML without surprises: no key twice, no aliases that grow without end, no dates or octal numbers by accident."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from fastreid_uns.errors import InvalidValue

LARGEST_FILE = 2**18  # bytes; a complete config has 4,000
MOST_VALUES = 100_000  # keys and values of one file, aliases counted as often as they are used
_INT = "tag:yaml.org,2002:int"
_TIME = "tag:yaml.org,2002:timestamp"


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Reads whole numbers as people do: 010 and 12:30 are text, and so is a date."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag not in (_INT, _TIME)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))


def read_yaml(file: Path) -> Any:
    """The content of a YAML file.

    Raises:
        ValueError: as `read_text`, or it is no YAML as `parse_yaml` accepts it.
    """
    return parse_yaml(read_text(file), file.name)


def read_text(file: Path) -> str:
    """The text of a config.

    Raises:
        ValueError: the file is too large, not in UTF-8, or not readable.
    """
    try:
        with file.open("rb") as stream:
            content = stream.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InvalidValue(f"{file}: the file cannot be read ({error.strerror}). Check its permissions.") from error
    if len(content) > LARGEST_FILE:
        raise InvalidValue(
            f"{file}: the file has more than {LARGEST_FILE:,} bytes; a config is a short text. Check the path."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidValue(
            f"{file}: byte {error.start} is no UTF-8; a text in UTF-8 is accepted. Save the file in that encoding."
        ) from error


def parse_yaml(text: str, name: str, *, scalars_as_text: bool = False) -> Any:
    """The value of one YAML document; an empty one is None.

    Args:
        text: the document.
        name: what messages call it.
        scalars_as_text: leave numbers, switches and nulls as they are written.

    Raises:
        ValueError: no valid YAML, a key twice in one map, or more than `MOST_VALUES` values.
    """
    if len(text) > LARGEST_FILE:
        raise InvalidValue(f"{name}: the text has more than {LARGEST_FILE:,} characters; a config is a short text.")
    loader = None
    try:
        text = str(text)  # the compiled reader takes no subclass
        loader = yaml.BaseLoader(text) if scalars_as_text else _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_growth(node, name)
        for part in _nodes(node):
            _refuse_duplicates(part, name)
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, KeyError, AttributeError) as error:  # the last three: `!!int x` and the like
        if isinstance(error, InvalidValue):
            raise
        if "maximum nesting depth" in str(error):
            raise _too_deep(name) from error
        told = " ".join(str(error).replace("<unicode string>", name).split())
        raise InvalidValue(f"{name}: no valid YAML: {told}. Correct it.") from error
    except RecursionError as error:
        raise _too_deep(name) from error
    finally:
        if loader is not None:
            loader.dispose()


def _too_deep(name: str) -> InvalidValue:
    return InvalidValue(f"{name}: the values are nested too deeply; a config is a map of maps.")


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Every node once, however many aliases lead to it."""
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            waiting += _children(node)
            yield node


def _refuse_growth(root: yaml.Node, name: str) -> None:
    """Count the values that aliases stand for, without following an alias twice."""
    sizes: dict[int, int | None] = {}  # None while a node is being counted

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise InvalidValue(f"{name}: an alias in line {_line(node)} contains itself. Write its values out.")
            return known
        sizes[id(node)] = None
        total = 1 + sum(map(size, _children(node)))
        sizes[id(node)] = total
        return total

    if size(root) > MOST_VALUES:
        raise InvalidValue(
            f"{name}: its aliases stand for more than {MOST_VALUES:,} values; a config is a short text. Check the file."
        )


def _refuse_duplicates(node: yaml.Node, name: str) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[tuple[str, str], yaml.Node] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        written = (key.tag, key.value)
        if written in first:
            raise InvalidValue(
                f"{name}: the key {key.value} is given twice, in line {_line(first[written])} and in line "
                f"{_line(key)}; one of the two values would be lost. Keep one."
            )
        first[written] = key


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
