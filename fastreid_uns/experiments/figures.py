"""Figures that papers and repositories have published, by the config that reproduces them."""

from __future__ import annotations

import csv
import functools
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).resolve().parents[2] / "projects/published.csv"  # of the checkout


class Figure(NamedTuple):
    """A row of the file, percentages as they are printed; an empty text = not stated."""

    method: str
    variant: str
    set: str
    mAP: str
    rank1: str
    rank5: str
    rank10: str
    source: str
    config: str  # that reproduces it; "" = none
    notes: str


@functools.cache
def published_figures() -> dict[tuple[str, str], Figure]:
    """The figure of each config and test set; the first of the file where there are several, {} without the file."""
    if not FILE.is_file():
        return {}
    found: dict[tuple[str, str], Figure] = {}
    with FILE.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            figure = Figure(**row)
            found.setdefault((figure.config, figure.set), figure)
    return found
