"""What a path that somebody typed means, and where the files are that ship with the package."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def expanded(path: str) -> str:
    """The path with a home folder in place of a leading `~/` or `~name/`; other texts, such as addresses, stay.

    So does `~` alone, which is null in YAML and hardly ever a home folder that somebody means.
    """
    return os.path.expanduser(path) if "/" in path else path


def path_of(text: str) -> Path:
    """The path of an argument of a command."""
    return Path(expanded(text))


def shipped_root() -> Path:
    """The folder below which `configs/` and `projects/` are: the installed package, or the checkout."""
    return _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
