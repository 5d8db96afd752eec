"""Progress bars on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """Iterate over `items` with a bar labelled `what`, shown only when stderr is a terminal."""
    return tqdm(items, desc=what, total=total, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())
