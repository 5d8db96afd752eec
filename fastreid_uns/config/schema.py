"""Which keys a config has: sections of the frame, components, maps of components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastreid_uns import registry
from fastreid_uns.bounds import check_bound
from fastreid_uns.config import renames
from fastreid_uns.config.values import REQUIRED, SAMPLES, cast, resolve
from fastreid_uns.defaults import DEFAULTS
from fastreid_uns.errors import InvalidValue, UnknownName, UserError, shown
from fastreid_uns.registry import Registry, did_you_mean

COMPONENTS: dict[str, Registry] = {
    "MODEL": registry.META_ARCH_REGISTRY,
    "MODEL.BACKBONE": registry.BACKBONE_REGISTRY,
    "MODEL.HEAD": registry.HEAD_REGISTRY,
    "MODEL.MEMORY": registry.MEMORY_REGISTRY,
    "PSEUDO_LABELS": registry.PSEUDO_LABEL_REGISTRY,
    "DATALOADER.SAMPLER": registry.SAMPLER_REGISTRY,
    "DATALOADER.SOURCE_SAMPLER": registry.SAMPLER_REGISTRY,
    "DATASETS.TRAIN": registry.DATASET_REGISTRY,
}
MAPS: dict[str, Registry] = {
    "DATASETS.SOURCES": registry.DATASET_REGISTRY,
    "DATASETS.TESTS": registry.DATASET_REGISTRY,
    "MODEL.LOSSES": registry.LOSS_REGISTRY,
    "HOOKS": registry.HOOK_REGISTRY,
    "INPUT.AUGMENTS": registry.AUGMENT_REGISTRY,
}
FREE = (  # sections whose keys are not ours to check
    "SOLVER.OPTIMIZER_ARGS",
    "SOLVER.RATE_FACTORS",
    "TEST.DOMAINS",
    "PAPER",
)
OPTIONAL = ("MODEL.MEMORY", "DATASETS.TRAIN")  # components that `null` switches off
USUAL = {"INPUT.AUGMENTS": "Augment"}  # maps whose entries need no NAME, and what it is then
_SHARED: dict[str, Any] = {
    "WEIGHT": 1.0,
    "START_EPOCH": 0,
    "DECISIONS": [],
}  # keys of all components of a kind that reserves them
_OF_A_MODEL = ("MODEL", "INPUT.SIZE", "INPUT.MEAN", "INPUT.STD")


class Completion:
    """Checks a tree of keys and fills in what it leaves out.

    Args:
        origin: path of a key → the file that gives it.
        tolerated: a file of which is kept as it is what no model needs and nobody knows, such as a data set of a
            script that is not there; None = of no file.
    """

    def __init__(self, origin: Mapping[str, str], *, tolerated: str | None = None) -> None:
        self.origin = origin
        self.tolerated = tolerated

    def section(self, given: Mapping, known: Mapping, where: str) -> dict[str, Any]:
        """`given` checked against `known`, and filled from it and from the signatures of components."""
        self._refuse_unknown(given, known, where)
        filled: dict[str, Any] = {}
        for key, default in known.items():
            path = f"{where}.{key}".lstrip(".")
            filled[key] = self._value(given.get(key, default), default, path)
        return {**filled, **{key: resolve(value, key) for key, value in given.items() if key not in known}}

    def _value(self, value: Any, default: Any, path: str) -> Any:
        source = self._source(path)
        if path in MAPS:
            entries = cast(value, {}, source)
            for name in entries:
                cast(name, "", f"{source}: the name of an entry")
            return {
                name: self._component(MAPS[path], cast(entry, {}, f"{source}.{name}"), f"{path}.{name}")
                for name, entry in entries.items()
            }
        if path in COMPONENTS:
            return self._component(COMPONENTS[path], cast(value, {}, source), path)
        if path in FREE:
            return resolve(cast(value, {}, source), source)
        if isinstance(default, dict):
            return self.section(cast(value, {}, source), default, path)
        new = renames.new_value(path, value)
        if new:
            raise InvalidValue(f"{source}: {value} was renamed to {new}. Write the new name.")
        value = cast(value, ["name"] if path == "PLUGINS" else default, source)
        check_bound(path, value, source)
        return value

    def _component(self, kind: Registry, section: dict, path: str) -> dict[str, Any]:
        try:
            return self._checked_component(kind, section, path)
        except UserError:
            if not self._is_tolerated(path, f"{path}.NAME"):
                raise
            return {**resolve(section, path), "NAME": str(section.get("NAME", ""))}

    def _checked_component(self, kind: Registry, section: dict, path: str) -> dict[str, Any]:
        name = self._name(kind, section, path)
        if not name:
            return {"NAME": ""}
        types = kind.types(name)
        # a required key has no default to tell its type, its annotation does
        samples = {key.upper(): SAMPLES.get(types[key]) for key in types}
        known = {"NAME": name, **{key.upper(): default for key, default in kind.schema(name).items()}}
        section = {**section, "NAME": name}
        if path == "MODEL":
            return self.section(section, {**known, **DEFAULTS["MODEL"], "NAME": name}, path)
        known |= {key: default for key, default in _SHARED.items() if key in kind.reserved}
        self._refuse_unknown(section, known, path)
        filled = {}
        for key, default in known.items():
            sample = samples.get(key) if default is REQUIRED else default
            source = self._source(f"{path}.{key}")
            filled[key] = cast(section.get(key, default), sample, source)
            check_bound(f"{path}.{key}", filled[key], source)
        return filled

    def _name(self, kind: Registry, section: Mapping, path: str) -> str:
        parent = path.rpartition(".")[0]
        name = cast(section.get("NAME", USUAL.get(parent, "")), "", self._source(f"{path}.NAME"))
        if name in kind or (not name and path in OPTIONAL):
            return name
        if not name:
            raise UnknownName(f"{self._file(path)}: {path} has no NAME; name a registered component.")
        new = renames.new_value(f"{path}.NAME", name)
        if new:
            raise UnknownName(f"{self._source(f'{path}.NAME')}: {name} was renamed to {new}. Write the new name.")
        try:
            kind.get(name)
        except UnknownName as error:
            raise UnknownName(f"{self._source(f'{path}.NAME')}: {error}") from None
        return name

    def _refuse_unknown(self, given: Mapping, known: Mapping, where: str) -> None:
        for key in given:
            path = f"{where}.{key}".lstrip(".")
            if key in known or self._is_tolerated(path, path):
                continue
            renamed = renames.new_key(path)
            if renamed:
                raise UnknownName(f"{self._file(path)}: {renamed}")
            raise UnknownName(
                f"{self._file(path)}: unknown key {path}{did_you_mean(str(key), known)} "
                f"Accepted here: {', '.join(known) or 'none'}."
            )

    def _is_tolerated(self, path: str, given: str) -> bool:
        needed = any(path == part or path.startswith(f"{part}.") for part in _OF_A_MODEL)
        return self.tolerated is not None and not needed and self.origin.get(given) == self.tolerated

    def _file(self, path: str) -> str:
        return self.origin.get(path, "defaults")

    def _source(self, path: str) -> str:
        return f"{self._file(path)}: {path}"


def refuse_no_map(value: Any, path: str, file: str) -> None:
    """Say that a section cannot be replaced by a value that is no map.

    Raises:
        ValueError: always.
    """
    found = "a list" if isinstance(value, list) else shown(value)
    if path in COMPONENTS:
        advice = f"Write {{NAME: {value}}}." if isinstance(value, str) else "Leave it out to keep what it is."
    else:
        advice = "Leave it out to keep its values, or write the keys that change below it."
    raise InvalidValue(f"{file}: {path} is {found}; a map of keys is accepted. {advice}")
