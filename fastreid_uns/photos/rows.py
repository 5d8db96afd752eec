"""Rows of the CSV files of a run: UTF-8, comma, `\\n`; every name that a disk can hold comes back as it was.

A name that a spreadsheet would run as a formula, such as `=HYPERLINK(...).jpg`, has an apostrophe before it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator

csv.field_size_limit(2**31 - 1)  # one field may name all photos of a large group


_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"-?[0-9.]+(e[+-]?[0-9]+)?")


def encode_row(values: Iterable[object]) -> bytes:
    """A row of a CSV file. The `csv` module leaves a lone carriage return without quotes, and then cannot read it."""
    fields = ("" if value is None else _harmless(str(value)) for value in values)
    text = ",".join('"' + field.replace('"', '""') + '"' if set(field) & set('",\r\n') else field for field in fields)
    return f"{text}\n".encode("utf-8", "surrogateescape")


def decode_rows(content: bytes) -> Iterator[list[str]]:
    """Rows of a CSV file, one that a spreadsheet wrote with a byte order mark included.

    Raises:
        csv.Error: quotes do not fit together.
    """
    text = content.decode("utf-8-sig", "surrogateescape")
    for row in csv.reader(io.StringIO(text, newline=""), strict=True):
        yield [field[1:] if field.startswith("'") and _FORMULA.match(field) else field for field in row]


def _harmless(field: str) -> str:
    return f"'{field}" if _FORMULA.match(field) and not _NUMBER.fullmatch(field) else field


def complete_length(content: bytes) -> int:
    """Number of bytes up to the end of the last row that was written whole.

    A row ends at a newline outside of quotes: after an even number of quote characters.
    """
    end = len(content)
    while end := content.rfind(b"\n", 0, end) + 1:
        if content.count(b'"', 0, end) % 2 == 0:
            return end
        end -= 1
    return 0
