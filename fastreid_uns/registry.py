"""The ten registries: the table of contents of what a project can add."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fvcore.common.registry import Registry as _Registry

from fastreid_uns.errors import UnknownName


class Registry(_Registry):
    """Names of one kind of component, their classes (or functions), and the keys that each accepts.

    Args:
        name: what is collected, as messages call it.
        reserved: keys of a config section that belong to the framework, not to the component's signature.

    Example:
        >>> SHAPES = Registry("SHAPE")
        >>> @SHAPES.register()
        ... class Square:
        ...     def __init__(self, *, side: float = 1.0) -> None:
        ...         self.side = side
        >>> SHAPES.build({"NAME": "Square", "SIDE": 3.0}).side
        3.0
        >>> SHAPES.build({"NAME": "Square", "SIED": 3.0})
        Traceback (most recent call last):
        fastreid_uns.errors.UnknownName: Square: unknown key SIED; did you mean SIDE? Accepted: SIDE.
    """

    def __init__(self, name: str, reserved: Iterable[str] = ()) -> None:
        super().__init__(name)
        self.reserved = frozenset(reserved)
        self._origins: dict[str, tuple[str, str]] = {}

    def register(self, obj: Any = None, *, name: str | None = None) -> Any:
        """Register a class or function, as a decorator or as a call.

        A file that is imported again, also under another module name, replaces what it registered before.

        Raises:
            KeyError: another module has registered the same name.
        """
        if obj is None:
            return lambda decorated: self.register(decorated, name=name)
        key = name or obj.__name__
        held = self._obj_map.get(key)
        again = held is not None and (held.__module__, held.__qualname__) == (obj.__module__, obj.__qualname__)
        if held is not None and not again and self._origins[key] != _origin(obj):
            raise UnknownName(
                f"{self._name} registry: {key} is registered by {held.__module__} and by {obj.__module__}; "
                f"names must be unique. Rename one of them, or load only one of the two plugins."
            )
        self._obj_map[key] = obj
        self._origins[key] = _origin(obj)  # now, as the module may be gone when another one asks
        return obj

    def get(self, name: str) -> Any:
        """Look up a component.

        Raises:
            KeyError: unknown name; the message holds near names and all known ones.
        """
        if name in self._obj_map:
            return self._obj_map[name]
        raise UnknownName(
            f"{self._name} registry: {name!r} is unknown{did_you_mean(name, self._obj_map)} "
            f"Known: {', '.join(sorted(self._obj_map)) or 'none'}. Name the project that defines it in PLUGINS."
        )

    def schema(self, name: str) -> dict[str, Any]:
        """Keyword-only parameters of a component and their defaults, see `keywords`."""
        return keywords(self.get(name))

    def types(self, name: str) -> dict[str, str]:
        """Annotations of the keyword-only parameters of a component, as they are written; "" where there is none."""
        return {key: _written(parameter.annotation) for key, parameter in _keyword_parameters(self.get(name)).items()}

    def build(self, section: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Make the component that `section.NAME` names.

        Args:
            section: `NAME` and upper-case keys, which become keyword arguments.
            args: positional arguments of the component, which no config can set.
            kwargs: keyword arguments that win over the section.

        Raises:
            KeyError: unknown name or key.
        """
        name = section["NAME"]
        schema = self.schema(name)
        given = {key.lower(): value for key, value in section.items() if key != "NAME" and key not in self.reserved}
        for key in given:
            if key not in schema:
                raise UnknownName(
                    f"{name}: unknown key {key.upper()}{did_you_mean(key.upper(), map(str.upper, schema))} "
                    f"Accepted: {', '.join(sorted(map(str.upper, schema))) or 'none'}."
                )
        return self.get(name)(*args, **{**given, **kwargs})


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the nearest known word, in upper or lower case, else a full stop."""
    words = {str(name).lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.6)
    return f"; did you mean {words[near[0]]}?" if near else "."


def keywords(component: Callable) -> dict[str, Any]:
    """Keyword-only parameters of a function or class and their defaults; `inspect.Parameter.empty` if required.

    A class that takes `**kwargs` has the keys of its parent as well.
    """
    return {key: parameter.default for key, parameter in _keyword_parameters(component).items()}


def _keyword_parameters(component: Callable) -> dict[str, inspect.Parameter]:
    if not inspect.isclass(component):
        return _own_keywords(component)[0]
    keys: dict[str, inspect.Parameter] = {}
    for cls in component.__mro__:
        if "__init__" in vars(cls):
            found, passes_on = _own_keywords(vars(cls)["__init__"])
            keys = {**found, **keys}
            if not passes_on:
                break
    return keys


def _written(annotation: Any) -> str:
    if annotation is inspect.Parameter.empty:
        return ""
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _origin(component: Any) -> tuple[str, str]:
    """File and name of a component."""
    module = sys.modules.get(component.__module__)
    return getattr(module, "__file__", None) or component.__module__, component.__qualname__


def _own_keywords(function: Callable) -> tuple[dict[str, inspect.Parameter], bool]:
    parameters = inspect.signature(function).parameters.values()
    keys = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    return keys, any(p.kind is p.VAR_KEYWORD for p in parameters)


BACKBONE_REGISTRY = Registry("BACKBONE")
HEAD_REGISTRY = Registry("HEAD")
META_ARCH_REGISTRY = Registry(
    "META_ARCH",
    reserved=[
        *("BACKBONE", "HEAD", "MEMORY", "LOSSES", "WEIGHTS", "WEIGHTS_HEAD", "DEVICE"),
        *("GHOST_BATCH", "FREEZE_NORM", "DOMAIN_BN"),
    ],
)
LOSS_REGISTRY = Registry("LOSS", reserved=["WEIGHT", "START_EPOCH"])
MEMORY_REGISTRY = Registry("MEMORY")
PSEUDO_LABEL_REGISTRY = Registry("PSEUDO_LABEL", reserved=["DECISIONS"])
SAMPLER_REGISTRY = Registry("SAMPLER")
DATASET_REGISTRY = Registry("DATASET")
HOOK_REGISTRY = Registry("HOOK")
AUGMENT_REGISTRY = Registry("AUGMENT")
