"""From what is written to the type of a key."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from fastreid_uns.config.yaml_text import parse_yaml
from fastreid_uns.errors import InvalidValue, shown
from fastreid_uns.utils.places import expanded

REQUIRED = inspect.Parameter.empty
SAMPLES: dict[str, Any] = {"str": "", "int": 0, "float": 0.0, "bool": False}  # of the types of required keys
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_KINDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", list: "a list"}


class Typed(str):
    """A value as it was typed on the command line; the type of its key decides what it means."""


def cast(value: Any, default: Any, where: str) -> Any:
    """`value` as the type of `default`; an int is taken for a float, nothing else is converted.

    Args:
        value: from a YAML file, or `Typed`.
        default: of the key; None accepts any type.
        where: file and key, as messages begin.

    Raises:
        ValueError: the value has another type, is missing or is not finite.
    """
    if value is REQUIRED:
        raise InvalidValue(f"{where} has no default; give it a value.")
    if isinstance(value, Typed):
        value = _read(value, default, where)
    if isinstance(default, str) and isinstance(value, str):
        return expanded(value)  # no text but a path begins with ~
    if default is None:
        return value
    if isinstance(default, float) and not isinstance(value, bool):
        value = _number(value)  # YAML reads 3e-4 as text
    if isinstance(default, (list, tuple)) and isinstance(value, (list, tuple)):
        sample = default[0] if default else None
        return [cast(item, sample, f"{where}[{i}]") for i, item in enumerate(value)]
    kind = dict if isinstance(default, Mapping) else list if isinstance(default, tuple) else type(default)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidValue(_wrong_type(value, default, kind, where))
    if isinstance(value, float) and not math.isfinite(value) and math.isfinite(default):
        raise InvalidValue(f"{where} is {value}; a finite number is accepted. Change the value.")
    return value


def resolve(value: Any, where: str) -> Any:
    """A value whose key has no known type: what is typed counts as YAML where it is no text."""
    if isinstance(value, Mapping):
        return {key: resolve(item, f"{where}.{key}") for key, item in value.items()}
    return cast(value, None, where)


def kind_of(value: Any) -> str:
    """What messages call the type of a value."""
    if isinstance(value, Mapping):
        return "a map"
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def _read(text: Typed, default: Any, where: str) -> Any:
    if isinstance(default, str):
        return _unquoted(text)
    if isinstance(default, bool):
        return _SWITCHES.get(text.strip().lower(), str(text))
    if isinstance(default, (int, float)):
        return _number(_unquoted(text), type(default))
    texts_only = isinstance(default, (list, tuple)) and bool(default) and isinstance(default[0], str)
    try:
        value = parse_yaml(text, where, scalars_as_text=texts_only)
    except InvalidValue:
        if isinstance(default, (list, tuple, Mapping)):
            raise
        return _unquoted(text)
    return _unquoted(text) if isinstance(value, str) else value


def _unquoted(text: str) -> str:
    """The text as it was typed, without a pair of quotes around all of it."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        try:
            value = parse_yaml(text, "text")
        except InvalidValue:
            return str(text)
        return value if isinstance(value, str) else str(text)
    return str(text)


def _number(value: Any, kind: type = float) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _wrong_type(value: Any, default: Any, kind: type, where: str) -> str:
    accepted = _KINDS.get(kind, "a map of keys")
    example = f" such as {default!r}" if default or isinstance(default, (int, float)) else ""
    found = "" if value is None else f", {kind_of(value)}"
    quotes = " Write it in quotes." if kind is str and not isinstance(value, (list, dict)) else " Change the value."
    return f"{where} is {shown(value)}{found}; {accepted}{example} is accepted.{quotes}"
