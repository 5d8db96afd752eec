"""One YAML, completed from the signatures of the components that it names.

Order: `defaults.DEFAULTS`, `add_config(cfg)` of each plugin, the YAML chain (`_BASE_`), the command line; then every
component section is checked against the signature of its `NAME` and filled with the defaults that stand there.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as _CfgNode

from fastreid_uns import plugins, registry
from fastreid_uns.data.augment import Augment
from fastreid_uns.defaults import DEFAULTS, USUAL_INPUT
from fastreid_uns.errors import InvalidValue, MissingFile, UnknownName
from fastreid_uns.registry import Registry, did_you_mean
from fastreid_uns.utils.paths import path_manager

REQUIRED = inspect.Parameter.empty

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
MAPS: dict[str, Registry | Callable] = {
    "DATASETS.SOURCES": registry.DATASET_REGISTRY,
    "DATASETS.TESTS": registry.DATASET_REGISTRY,
    "MODEL.LOSSES": registry.LOSS_REGISTRY,
    "HOOKS": registry.HOOK_REGISTRY,
    "INPUT.AUGMENTS": Augment,
}
FREE = ("SOLVER.OPTIMIZER_ARGS", "PAPER")  # sections whose keys are not ours to check


class CfgNode(_CfgNode):
    """A yacs node that names the nearest key when one is missing."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"config: no key {name}{did_you_mean(name, self)} Present: {', '.join(self)}.")


def load_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """The complete, checked and frozen config.

    Args:
        file: a YAML file; `_BASE_` in it names one file or a list, relative to it, that it builds upon.
        overrides: `KEY VALUE KEY VALUE ...` or `KEY=VALUE ...`, keys with dots, values in YAML notation.

    Raises:
        KeyError: a key or component is unknown; the message names the file, the key and the nearest known one.
        ValueError: a value has the wrong type, or the overrides are not pairs.
        FileNotFoundError: a YAML file does not exist.
    """
    layers = list(_read_chain(Path(file))) if file else []
    return _build([*layers, ("command line", _parse_overrides(overrides))])


def parse_config(text: str, name: str = "config") -> CfgNode:
    """The config that `cfg.dump()` wrote, for example into a checkpoint that messages call `name`."""
    return _build([(name, yaml.safe_load(text))])


def deviations(cfg: CfgNode) -> list[str]:
    """Where a config departs from its `PAPER`: `KEY: value instead of value` for each such key."""
    found = []

    def compare(stated: Mapping, held: Any, where: str) -> None:
        for key, value in stated.items():
            path = f"{where}.{key}".lstrip(".")
            own = held.get(key) if isinstance(held, Mapping) else None
            if isinstance(value, Mapping):
                compare(value, own, path)
            elif own != value:
                found.append(f"{path}: {own} instead of {value}")

    compare(cfg.PAPER, cfg, "")
    return found


def _build(layers: Sequence[tuple[str, dict]]) -> CfgNode:
    plugins.load_plugins(["fastreid_uns.builtin"])
    entries: Any = next((layer["PLUGINS"] for _, layer in reversed(layers) if "PLUGINS" in layer), [])
    base = CfgNode(copy.deepcopy(DEFAULTS))
    for module in plugins.load_plugins(_cast(entries, ["name"], "PLUGINS")):
        if hasattr(module, "add_config"):
            module.add_config(base)
    known = _as_dict(base)
    merged = copy.deepcopy(known)
    origin: dict[str, str] = {}
    for name, content in layers:
        _merge(merged, content, name, "", origin)
    cfg = CfgNode(_complete(merged, known, "", origin))
    _fill_input(cfg)
    cfg.freeze()
    return cfg


def _fill_input(cfg: CfgNode) -> None:
    """Numbers for the empty keys of `INPUT`: those that published weights expect, else the usual ones."""
    wanted = dict(USUAL_INPUT)
    backbone = registry.BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME) if cfg.MODEL.BACKBONE.NAME else None
    empty = any(not cfg.INPUT[key] for key in wanted)
    if empty and cfg.MODEL.WEIGHTS == "imagenet" and hasattr(backbone, "pretrained_input"):
        wanted |= backbone.pretrained_input(cfg.MODEL.BACKBONE)
    for key, value in wanted.items():
        cfg.INPUT[key] = _cast(cfg.INPUT[key] or value, USUAL_INPUT[key], f"INPUT.{key}")


def _read_chain(file: Path, below: tuple[Path, ...] = ()) -> Iterator[tuple[str, dict]]:
    file = Path(path_manager.get_local_path(str(file))).absolute()
    if not file.is_file():
        named = f", named as _BASE_ by {below[-1]}" if below else ""
        raise MissingFile(f"config file {file} does not exist{named}. Check the path.")
    if file in below:
        raise InvalidValue(f"{file.name}: _BASE_ runs in a circle: {' -> '.join(p.name for p in (*below, file))}.")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InvalidValue(f"{file.name}: no valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise InvalidValue(f"{file.name}: found a {type(content).__name__}; a config is a map of keys. Check the file.")
    bases = content.pop("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        yield from _read_chain(file.parent / base, (*below, file))
    if "PLUGINS" in content:
        entries = _cast(content["PLUGINS"], ["name"], f"{file.name}: PLUGINS")
        content["PLUGINS"] = [plugins.resolve_plugin(entry, file.parent) for entry in entries]
    yield file.name, content


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    words: list[str] = []
    for word in overrides:
        words += word.split("=", 1) if len(words) % 2 == 0 and "=" in word else [word]
    if len(words) % 2:
        raise InvalidValue(f"command line: key {words[-1]!r} has no value; give KEY VALUE pairs.")
    tree: dict[str, Any] = {}
    for key, value in zip(words[::2], words[1::2], strict=True):
        node = tree
        *parents, last = key.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise InvalidValue(f"command line: {key} lies below {parent}, which is given a value as well.")
        try:
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            node[last] = value
    if "PLUGINS" in tree:
        entries = _cast(tree["PLUGINS"], ["name"], "command line: PLUGINS")
        tree["PLUGINS"] = [plugins.resolve_plugin(entry, Path.cwd()) for entry in entries]
    return tree


def _merge(into: dict, new: Mapping, file: str, where: str, origin: dict[str, str]) -> None:
    for key, value in new.items():
        path = f"{where}.{key}".lstrip(".")
        origin[path] = file
        if value is None and where in MAPS:
            into.pop(key, None)
        elif value is None and path in COMPONENTS:
            into[key] = {"NAME": ""}
        elif isinstance(value, Mapping):
            held = into.get(key)
            if not isinstance(held, dict):
                held = into[key] = {}
            elif "NAME" in value and held.get("NAME", value["NAME"]) != value["NAME"]:
                # a new component does not inherit the keys of the old one
                stays = COMPONENTS[path].reserved if path in COMPONENTS else ()
                held = into[key] = {k: v for k, v in held.items() if k in stays}
            _merge(held, value, file, path, origin)
        else:
            into[key] = value


def _complete(given: dict, known: dict, where: str, origin: dict[str, str]) -> dict:
    """`given` checked against `known`, and filled from it and from the signatures of components."""
    _refuse_unknown(given, known, where, origin)
    filled: dict[str, Any] = {}
    for key, default in known.items():
        path = f"{where}.{key}".lstrip(".")
        value = given.get(key, default)
        source = f"{origin.get(path, 'defaults')}: {path}"
        if path in MAPS:
            entries = _cast(value, {}, source)
            filled[key] = {
                name: _component(MAPS[path], _cast(entry, {}, f"{source}.{name}"), f"{path}.{name}", origin)
                for name, entry in entries.items()
            }
        elif path in COMPONENTS:
            filled[key] = _component(COMPONENTS[path], _cast(value, {}, source), path, origin)
        elif isinstance(default, dict) and path not in FREE:
            filled[key] = _complete(_cast(value, {}, source), default, path, origin)
        else:
            filled[key] = _cast(value, default, source)
    return filled


def _component(kind: Registry | Callable, section: dict, path: str, origin: dict[str, str]) -> dict:
    if not isinstance(kind, Registry):
        known = {key.upper(): default for key, default in registry.keywords(kind).items()}
        return _complete(section, known, path, origin)
    if not section.get("NAME"):
        if path.rpartition(".")[0] in MAPS:
            raise UnknownName(f"{origin.get(path, 'defaults')}: {path} has no NAME; name a registered component.")
        return {"NAME": ""}
    try:
        schema = kind.schema(section["NAME"])
    except KeyError as error:
        file = origin.get(f"{path}.NAME", "defaults")
        raise UnknownName(f"{file}: {path}.NAME: {error.args[0]}") from None
    fixed = {"MODEL": DEFAULTS["MODEL"]}.get(path, {"WEIGHT": 1.0} if "WEIGHT" in kind.reserved else {})
    known = {"NAME": "", **{key.upper(): default for key, default in schema.items()}, **fixed}
    if path != "MODEL":
        _refuse_unknown(section, known, path, origin)
        return {
            key: _cast(section.get(key, default), default, f"{origin.get(f'{path}.{key}', 'defaults')}: {path}.{key}")
            for key, default in known.items()
        }
    return _complete(section, known, path, origin)


def _refuse_unknown(given: Mapping, known: Mapping, where: str, origin: dict[str, str]) -> None:
    for key in given:
        if key not in known:
            path = f"{where}.{key}".lstrip(".")
            raise UnknownName(
                f"{origin.get(path, 'defaults')}: unknown key {path}{did_you_mean(str(key), known)} "
                f"Accepted here: {', '.join(known) or 'none'}."
            )


def _cast(value: Any, default: Any, where: str) -> Any:
    """`value` as the type of `default`; an int is taken for a float, nothing else is converted."""
    if value is REQUIRED:
        raise InvalidValue(f"{where} has no default; give it a value.")
    if default is None or default is REQUIRED:
        return value
    if isinstance(default, float) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 3e-4 as text
        except (TypeError, ValueError):
            pass
    kind: type | tuple[type, ...] = type(default)
    if isinstance(default, (list, tuple)):
        if isinstance(value, (list, tuple)):
            sample = default[0] if len(default) else None
            return [_cast(item, sample, f"{where}[{i}]") for i, item in enumerate(value)]
        kind = list
    elif isinstance(default, Mapping):
        kind = dict
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise InvalidValue(
        f"{where} is {value!r}, a {type(value).__name__}; a {getattr(kind, '__name__', kind)} such as {default!r} is "
        f"accepted. Change the value."
    )


def _as_dict(node: Any) -> Any:
    return {key: _as_dict(value) for key, value in node.items()} if isinstance(node, dict) else node
