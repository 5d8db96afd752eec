"""Rows of CSV files: whatever a name is, it comes back, and no spreadsheet runs it."""

import csv
import io

import pytest

from fastreid_uns.photos.rows import decode_rows, encode_row

NAMES = [
    "=HYPERLINK(1).jpg",
    "+1+cmd|' /C calc'!A0.jpg",
    "-2+3.png",
    "@SUM(1).png",
    "\t=1",
    "'=kept",
    "''=kept",
    "'plain",
    "a=b",
    "-0.25",
    "-1",
    "1e-05",
    'quote"d, name',
    "line\nfeed",
    "carriage\rreturn",
    "",
    "\udcff",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_comes_back_and_begins_no_formula(name):
    row = encode_row([name, "x"])
    assert list(decode_rows(row)) == [[name, "x"]]
    (shown, _), *_ = csv.reader(io.StringIO(row.decode("utf-8", "surrogateescape"), newline=""))
    number = name in ("-0.25", "-1")
    assert number or shown[:1] not in ("=", "+", "-", "@", "\t")
    assert shown in (name, f"'{name}")
