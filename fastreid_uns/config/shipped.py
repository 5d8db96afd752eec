"""Where a config file is found: as it is named, or among those that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

from fastreid_uns.errors import MissingFile
from fastreid_uns.registry import did_you_mean
from fastreid_uns.utils.paths import path_manager
from fastreid_uns.utils.places import expanded, shipped_root


def find_config(name: str | Path, named_by: Path | None = None) -> Path:
    """The file that a name means.

    Args:
        name: path relative to the working directory, or below `shipped_root()`.
        named_by: the file that names it as `_BASE_`; the path is then relative to that file.

    Raises:
        FileNotFoundError: there is none.
    """
    by = f", named as _BASE_ by {named_by}" if named_by else ""
    try:
        local = Path(path_manager.get_local_path(expanded(str(name))))
    except OSError as error:
        raise MissingFile(f"config file {name} cannot be fetched ({error}){by}. Check the address.") from error
    first = (named_by.parent if named_by else Path.cwd()) / local
    if os.path.isfile(first):
        return first.absolute()
    shipped = shipped_root() / local
    if not local.is_absolute() and ".." not in local.parts and os.path.isfile(shipped):
        return shipped
    if os.path.exists(first):
        raise MissingFile(f"config file {first} is no file{by}. Name a YAML file.")
    near = did_you_mean(str(local), shipped_configs())
    raise MissingFile(f"config file {first} does not exist{by}{near} Check the path.")


def shipped_configs() -> list[str]:
    """The names of all configs that ship with the package."""
    root = shipped_root()
    files = [*root.glob("configs/**/*.yaml"), *root.glob("projects/*/configs/**/*.yaml")]
    return sorted(file.relative_to(root).as_posix() for file in files)
