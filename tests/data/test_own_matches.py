"""Queries that find themselves: by path, by content, and where the protocol takes them out."""

from __future__ import annotations

import pytest

from fastreid_uns.data.datasets.own_matches import own_matches
from fastreid_uns.errors import InvalidValue
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
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


@pytest.mark.parametrize(("own", "others"), [(0, 3), (1, 1), (1, 2)])
def test_an_evaluation_says_so_when_it_is_set_up(files, caplog, own, others):
    """Queries are copies of gallery images, or other files; up to the half of them is a warning."""
    queries = [Record(files["copy"], 1, -1)] * own + [Record(f"{files['missing']}{i}", 1, -1) for i in range(others)]
    Evaluator(ReIDData([], queries, [Record(files["a"], 1, -1)], "plain"), Images(len(queries) + 1))
    text = f"1 of {own + others} queries are in the gallery themselves, such as {files['copy']} = {files['a']}, and"
    assert (text in caplog.text) == bool(own)


def test_an_evaluation_of_which_most_queries_find_themselves_is_refused(files):
    queries = [Record(files[name], 1, -1) for name in ("copy", "b", "c")]
    gallery = [Record(files[name], 1, -1) for name in ("a", "b")]
    with pytest.raises(
        InvalidValue, match=r"^evaluation: 2 of 3 queries are in the gallery themselves, .*Take them out"
    ):
        Evaluator(ReIDData([], queries, gallery, "plain"), Images(5))
