"""Queries that find themselves: by path, by content, and where the protocol takes them out."""

from __future__ import annotations

import pytest

from fastreid_uns.data.datasets.own_matches import own_matches
from fastreid_uns.evaluation.evaluator import Evaluator
from fastreid_uns.structures import Record, ReIDData


def pair(query: Record, gallery: Record, protocol: str = "plain") -> ReIDData:
    return ReIDData([], [query], [gallery], protocol)


@pytest.fixture
def files(tmp_path):
    """a and its copy, b of the same size, c of another one."""
    contents = {"a": b"one", "copy": b"one", "b": b"two", "c": b"three"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: str(tmp_path / name) for name in (*contents, "missing")}


@pytest.mark.parametrize(
    ("query", "gallery", "protocol", "expected"),
    [
        (("a", 1, -1), ("a", 1, -1), "plain", True),
        (("a", 1, -1), ("copy", 1, -1), "plain", True),
        (("a", 1, 0), ("copy", 1, 1), "one_per_identity", True),
        (("a", 1, -1), ("b", 1, -1), "plain", False),
        (("a", 1, -1), ("c", 1, -1), "plain", False),
        (("a", 1, -1), ("a", 2, -1), "plain", False),  # no match, whatever it shows
        (("a", -1, -1), ("a", -1, -1), "plain", False),  # junk
        (("a", 1, 0), ("a", 1, 0), "cross_camera", False),  # taken out
        (("a", 1, 0), ("a", 1, 1), "cross_camera", True),
        (("missing", 1, -1), ("missing", 1, -1), "plain", True),
        (("missing", 1, -1), ("a", 1, -1), "plain", False),
    ],
)
def test_pairs(files, query, gallery, protocol, expected):
    first, second = (Record(files[name], identity, camera) for name, identity, camera in (query, gallery))
    assert own_matches(pair(first, second, protocol)) == ([(first.path, second.path)] if expected else [])


def test_paths_tell_alone_if_asked(files):
    data = pair(Record(files["a"], 1, -1), Record(files["copy"], 1, -1))
    assert own_matches(data, contents=False) == []


class Images:
    def __len__(self):
        return 3


@pytest.mark.parametrize("own", [True, False])
def test_an_evaluation_says_so_when_it_is_set_up(files, caplog, own):
    gallery = [Record(files["a" if own else "b"], 1, -1), Record(files["c"], 1, -1)]
    Evaluator(ReIDData([], [Record(files["copy"], 1, -1)], gallery, "plain"), Images())
    text = f"1 of 1 queries are in the gallery themselves, such as {files['copy']} = {files['a']}, and protocol plain"
    assert (text in caplog.text) == own
