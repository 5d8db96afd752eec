"""From files, texts and overrides to a config."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode as _CfgNode

from fastreid_uns.bounds import check_bound, check_relations
from fastreid_uns.config.overrides import parse_overrides
from fastreid_uns.config.renames import translate
from fastreid_uns.config.schema import COMPONENTS, FREE, MAPS, OPTIONAL, USUAL, Completion, refuse_no_map
from fastreid_uns.config.shipped import find_config
from fastreid_uns.config.values import Typed, cast, kind_of
from fastreid_uns.config.yaml_text import parse_yaml, read_yaml
from fastreid_uns.defaults import DEFAULTS, USUAL_INPUT
from fastreid_uns.errors import InvalidValue, MissingPackage, UnknownName, shown
from fastreid_uns.plugins import is_installed, load_plugins, resolve_plugin
from fastreid_uns.registry import BACKBONE_REGISTRY, did_you_mean

MOST_FILES = 100  # of one chain of `_BASE_`


class CfgNode(_CfgNode):
    """A yacs node that names the nearest key when one is missing."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"config: no key {name}{did_you_mean(name, self)} Present: {', '.join(self)}.")

    def dump(self, **options: Any) -> str:
        """YAML text that loads again as an equal config; an entry of a map that is there by default and not here is
        written as null."""
        tree = _as_dict(self)
        for path in MAPS:
            held, usual = _at(tree, path), _at(DEFAULTS, path)
            if held:
                held.update({name: None for name in usual or {} if name not in held})
        return yaml.safe_dump(tree, **{"sort_keys": False, **options})


def load_config(file: str | Path | None = None, overrides: Sequence[str] = ()) -> CfgNode:
    """The complete, checked and frozen config.

    Args:
        file: a YAML file, or the name of one that ships with the package (`projects/ACFL/configs/market.yaml`);
            `_BASE_` in it names one file or a list, relative to it, that it builds upon.
        overrides: `KEY VALUE KEY VALUE ...` or `KEY=VALUE ...`, keys with dots. Where the key holds text the value is
            taken as it is typed; numbers, switches, lists and sections are read as in YAML.

    Raises:
        KeyError: a key or component is unknown; the message names the file, the key and the nearest known one.
        ValueError: a value has the wrong type or is out of bounds, a file is no config, or the overrides are no pairs.
        FileNotFoundError: a YAML file does not exist.
        ImportError: a plugin does not exist.
    """
    layers = list(_read_chain(find_config(file), [])) if file else []
    return _build([*layers, ("command line", parse_overrides(overrides))])


def parse_config(
    text: str,
    name: str = "config",
    overrides: Sequence[str] = (),
    *,
    trust: bool = False,
    plugins: Sequence[str] = (),
    model_only: bool = False,
) -> CfgNode:
    """The config that `cfg.dump()` wrote, for example into a checkpoint; keys of earlier versions are translated.

    Args:
        text: YAML of a complete config.
        name: what messages call it, such as the file of the checkpoint.
        overrides: as for `load_config`.
        trust: import plugin folders that the text names. Their code runs, so say so only for files of your own.
        plugins: import these instead of the folders that the text names.
        model_only: nothing but the model is needed. Data sets, samplers, hooks and plugins that are not there any
            more are then kept as they are.

    Raises:
        KeyError, ValueError, ImportError: as for `load_config`; a plugin folder is named and not trusted.
    """
    content = parse_yaml(text, name)
    if not isinstance(content, dict):
        raise InvalidValue(f"{name}: found {kind_of(content)}; the text of a config is accepted.")
    content = translate(content)
    entries = cast(content.get("PLUGINS", []), ["name"], f"{name}: PLUGINS")
    strange = [entry for entry in entries if not is_installed(entry)] if plugins or not trust else []
    if strange and not plugins and not model_only:
        raise InvalidValue(_untrusted(name, strange))
    given = [resolve_plugin(entry, Path.cwd()) for entry in plugins]
    content["PLUGINS"] = list(dict.fromkeys([*(entry for entry in entries if entry not in strange), *given]))
    layers = [(name, content), ("command line", parse_overrides(overrides))]
    missing = [_untrusted(name, strange)] if strange and not plugins else []
    return _build(layers, whole=True, model_only=model_only, missing=missing)


def _untrusted(name: str, entries: Sequence[str]) -> str:
    return (
        f"{name}: its config names the plugin {', '.join(entries)}, which is code from outside of the package; from a "
        f"checkpoint only installed plugins are imported. If you trust its code pass trust=True, or plugins=[...] "
        f"with the folder where it is now (--plugins FOLDER on a command line)."
    )


def _build(
    layers: Sequence[tuple[str, dict]], *, whole: bool = False, model_only: bool = False, missing: Sequence[str] = ()
) -> CfgNode:
    """
    Args:
        layers: names and contents, the later one wins.
        whole: the first layer is a complete config, its maps replace those of the defaults.
        model_only: see `parse_config`.
        missing: what is said about plugins that are left out.
    """
    load_plugins(["fastreid_uns.builtin"])
    base = CfgNode(copy.deepcopy(DEFAULTS))
    missing = [*missing, *_add_plugins(base, layers, model_only)]
    merged = _as_dict(base)
    known = copy.deepcopy(merged)
    known["INPUT"] |= USUAL_INPUT  # the types of keys that are empty by default
    origin: dict[str, str] = {}
    for number, (name, content) in enumerate(layers):
        for path in MAPS if whole and number == 0 else ():
            if _at(content, path) is not None:
                _at(merged, path).clear()
        _merge(merged, content, name, "", origin)
    try:
        tolerated = layers[0][0] if model_only else None
        cfg = CfgNode(Completion(origin, tolerated=tolerated).section(merged, known, ""))
    except UnknownName as error:
        if missing:
            raise UnknownName(f"{error} Not imported: {'; '.join(missing)}") from error
        raise
    _fill_input(cfg)
    if not model_only:
        check_relations(cfg)
    cfg.freeze()
    return cfg


def _fill_input(cfg: CfgNode) -> None:
    """Numbers for the empty keys of `INPUT`: those that published weights expect, else the usual ones."""
    numbers = dict(USUAL_INPUT)
    empty = any(not cfg.INPUT[key] for key in numbers)
    if empty and cfg.MODEL.WEIGHTS == "imagenet" and cfg.MODEL.BACKBONE.NAME:
        backbone = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
        if hasattr(backbone, "pretrained_input"):
            numbers |= backbone.pretrained_input(cfg.MODEL.BACKBONE)
    for key, value in numbers.items():
        cfg.INPUT[key] = cfg.INPUT[key] or list(value)


def _add_plugins(base: CfgNode, layers: Sequence[tuple[str, dict]], model_only: bool) -> list[str]:
    """Import the plugins of the last layer that names any, and add their keys.

    Returns:
        What is said about those that are missing and may be.
    """
    file, given = next(((name, layer["PLUGINS"]) for name, layer in reversed(layers) if "PLUGINS" in layer), ("", []))
    entries = cast(given, ["name"], f"{file}: PLUGINS")
    check_bound("PLUGINS", entries, f"{file}: PLUGINS")
    missing = []
    for entry in entries:
        try:
            modules = load_plugins([entry])
        except MissingPackage as error:
            if not model_only:
                raise MissingPackage(f"{file}: {error}") from error
            missing.append(str(error))
            continue
        for module in modules:
            if hasattr(module, "add_config"):
                module.add_config(base)
    return missing


def _read_chain(file: Path, read: list[Path], below: tuple[Path, ...] = ()) -> Iterator[tuple[str, dict]]:
    """Names and contents of a file and of all that it builds upon, these first.

    Args:
        file: the YAML.
        read: all files so far, which becomes longer.
        below: the files that lead here by `_BASE_`.
    """
    chain = (*below, file.resolve())
    if chain[-1] in below:
        raise InvalidValue(f"{file.name}: _BASE_ runs in a circle: {' -> '.join(path.name for path in chain)}.")
    read.append(file)
    if len(read) > MOST_FILES:
        raise InvalidValue(f"{file.name}: _BASE_ leads to more than {MOST_FILES} files. Name each base once.")
    content = read_yaml(file)
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise InvalidValue(f"{file.name}: found {kind_of(content)}; a config is a map of keys. Check the file.")
    for base in _bases(content.pop("_BASE_", []), file):
        yield from _read_chain(find_config(base, file), read, chain)
    if "PLUGINS" in content:
        entries = cast(content["PLUGINS"], ["name"], f"{file.name}: PLUGINS")
        content["PLUGINS"] = [resolve_plugin(entry, file.parent) for entry in entries]
    yield file.name, content


def _bases(value: Any, file: Path) -> list[str]:
    bases = [value] if isinstance(value, str) else value
    if not isinstance(bases, list) or not all(isinstance(base, str) and base for base in bases):
        raise InvalidValue(
            f"{file.name}: _BASE_ is {shown(value)}; a file such as ../base.yaml is accepted, or a list of files. "
            f"Change it."
        )
    return bases


def _merge(into: dict, new: Mapping, file: str, where: str, origin: dict[str, str]) -> None:
    for key, value in new.items():
        path = f"{where}.{key}".lstrip(".")
        origin[path] = file
        held = into.get(key)
        free = any(path.startswith(f"{section}.") for section in FREE)
        part = path in COMPONENTS or where in MAPS or (isinstance(held, dict) and not free)
        if isinstance(value, Typed) and part:
            value = parse_yaml(value, f"{file}: {path}")
        if value is None and where in MAPS:
            into.pop(key, None)
        elif value is None and path in OPTIONAL:
            into[key] = {"NAME": ""}
        elif not value and (path in MAPS or path in FREE) and (value is None or isinstance(value, Mapping)):
            into[key] = {}
        elif isinstance(value, Mapping):
            into[key] = _section_to_fill(held, value, where, path)
            _merge(into[key], value, file, path, origin)
        elif part:
            refuse_no_map(value, path, file)
        else:
            into[key] = value


def _section_to_fill(held: Any, value: Mapping, where: str, path: str) -> dict:
    """What a section merges into; a new component does not inherit the keys of the old one."""
    if not isinstance(held, dict):
        return {}
    name = value.get("NAME")
    if isinstance(name, Typed):
        name = cast(name, "", f"{path}.NAME")  # quoted or not
    if name is None or held.get("NAME", USUAL.get(where, name)) == name:
        return held
    stays = COMPONENTS[path].reserved if path in COMPONENTS else ()
    return {k: v for k, v in held.items() if k in stays}


def _as_dict(node: Any) -> Any:
    return {key: _as_dict(value) for key, value in node.items()} if isinstance(node, dict) else node


def _at(tree: Any, path: str) -> Any:
    """The value below a path of keys; None where there is none."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
