"""From the entries of `PLUGINS` to imported modules."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points, packages_distributions
from pathlib import Path
from types import ModuleType

from fastreid_uns.errors import MissingPackage
from fastreid_uns.utils.places import expanded

PACKAGE = "fastreid_uns"
GROUP = f"{PACKAGE}.plugins"


def resolve_plugin(entry: str, folder: Path) -> str:
    """An entry as it is valid from everywhere: a folder becomes absolute, names stay as they are.

    Args:
        entry: dotted module, entry point, or a folder given with a slash or a leading dot.
        folder: where the file that names it lies.
    """
    return str((folder / expanded(entry)).resolve()) if "/" in entry or entry.startswith(".") else entry


def is_installed(entry: str) -> bool:
    """Whether an entry is part of this package or of another installed one, or has been imported already.

    A folder is not, and neither is a module that Python finds in the working directory only.
    """
    if "/" in entry or entry.startswith("."):
        return False
    package = entry.partition(".")[0]
    return (
        package == PACKAGE
        or entry in sys.modules
        or bool(entry_points(group=GROUP, name=entry))
        or package in packages_distributions()
    )


def load_plugins(entries: Sequence[str]) -> list[ModuleType]:
    """Import each entry, which registers its components.

    Args:
        entries: dotted modules (`fastreid_uns.projects.ACFL`), names of installed entry points in the group
            `fastreid_uns.plugins`, or absolute paths of folders with an `__init__.py`.

    Raises:
        ImportError: an entry is none of the three; the message says what was tried.
    """
    return [_load(entry) for entry in entries]


def _load(entry: str) -> ModuleType:
    if "/" in entry:
        return _load_folder(Path(entry))
    # what ships with the package is no entry point; looking through all that is installed takes longer than the import
    for point in () if entry.startswith(f"{PACKAGE}.") else entry_points(group=GROUP, name=entry):
        loaded = point.load()
        return loaded if isinstance(loaded, ModuleType) else sys.modules[point.module]
    try:
        return importlib.import_module(entry)
    except ModuleNotFoundError as error:
        if error.name is None or not entry.startswith(error.name):
            raise
        installed = ", ".join(sorted(point.name for point in entry_points(group=GROUP))) or "none"
        raise MissingPackage(
            f"PLUGINS: {entry!r} is no module that Python finds and no entry point of the group {GROUP} "
            f"(installed: {installed}). A folder next to the YAML is written with a slash, as ./{entry}."
        ) from error


def _load_folder(folder: Path) -> ModuleType:
    init = folder / "__init__.py"
    if not folder.is_dir():
        raise MissingPackage(f"PLUGINS: the folder {folder} does not exist. Name the place to which it was moved.")
    if not init.is_file():
        raise MissingPackage(
            f"PLUGINS: {folder} has no __init__.py; a plugin folder is a Python package. Add the file."
        )
    name = f"{folder.name}_{hashlib.sha1(str(folder).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(folder)])
    if spec is None or spec.loader is None:
        raise MissingPackage(f"PLUGINS: {init} cannot be loaded as a Python module.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    complete = False
    try:
        spec.loader.exec_module(module)
        complete = True
    finally:
        if not complete:
            del sys.modules[name]
    return module
