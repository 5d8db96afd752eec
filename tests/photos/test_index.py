"""The index holds what it needs, refuses what it cannot compare, and survives what happens around it."""

from __future__ import annotations

import os

import pytest
import torch
from torch.nn.functional import normalize

from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile
from fastreid_uns.photos.index import Index, Preprocessing, weights_fingerprint

WEIGHTS = {"b.weight": torch.arange(6.0).view(2, 3), "a.count": torch.tensor(3)}
AXES = torch.eye(4)


def make(**changes) -> Index:
    values = {
        "features": AXES[:3],
        "paths": ["a.jpg", "ü b.jpg", os.fsdecode(b"\xff.jpg")],
        "groups": torch.tensor([1, 1, 5]),
        "preprocessing": Preprocessing((128, 64), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        "fingerprint": weights_fingerprint(WEIGHTS),
        "weights": WEIGHTS,
        "whitening": {"mean": torch.ones(4)},
        "thresholds": {"known": 0.5},
        "about": {"backbone": "SmallNet"},
    }
    return Index(**{**values, **changes})


def test_everything_comes_back(tmp_path):
    index = make()
    index.save(tmp_path / "new" / "index.safetensors")
    again = Index.load(tmp_path / "new" / "index.safetensors")
    assert torch.equal(again.features, index.features)
    assert torch.equal(again.groups, index.groups)
    assert again.paths == index.paths
    for name in ("preprocessing", "fingerprint", "thresholds", "about"):
        assert getattr(again, name) == getattr(index, name)
    assert torch.equal(again.whitening["mean"], torch.ones(4))
    assert {name: tensor.tolist() for name, tensor in again.weights.items()} == {
        name: tensor.tolist() for name, tensor in WEIGHTS.items()
    }


def test_several_queries_at_once():
    queries = normalize(torch.tensor([[1.0, 0.5, 0, 0], [0, 0.6, 0.8, 0]]))
    found = make().search(queries, top=2)
    assert found.rows.tolist() == [[0, 1], [2, 1]]
    assert torch.allclose(found.similarity[1], torch.tensor([0.8, 0.6]))
    assert make().search(queries, top=99).rows.shape == (2, 3)


def test_add_and_remove():
    index = make()
    index.add(AXES[3:], ["d.jpg"], torch.tensor([6]))
    assert index.search(AXES[3:]).rows.tolist() == [[3]]
    index.remove(["a.jpg", "ü b.jpg"])
    assert index.paths == [os.fsdecode(b"\xff.jpg"), "d.jpg"]
    assert index.groups.tolist() == [5, 6]
    assert index.search(AXES[3:]).rows.tolist() == [[1]]
    with pytest.raises(InvalidValue, match=r"'d\.jpg' is in it already"):
        index.add(AXES[:1], ["d.jpg"], torch.tensor([1]))
    with pytest.raises(InvalidValue, match=r"'a\.jpg' is not in it"):
        index.remove(["a.jpg"])
    with pytest.raises(InvalidValue, match="no photo would be left"):
        index.remove(index.paths)
    assert len(index) == 2


@pytest.mark.parametrize(
    "features",
    [torch.full((3, 4), float("nan")), torch.zeros(3, 4), torch.empty(0, 4), torch.empty(3, 0), AXES[0], 2 * AXES[:3]],
)
def test_features_that_cannot_be_compared_are_refused(features):
    with pytest.raises(InvalidValue, match="index: "):
        make(features=features)
    with pytest.raises(InvalidValue, match="index: "):
        make().add(features, ["x", "y", "z"], torch.tensor([1, 1, 1]))
    with pytest.raises(InvalidValue, match="index: "):
        make().search(features)


def test_lengths_and_numbers_must_fit():
    for changes in ({"paths": ["a"]}, {"groups": torch.tensor([1, 1])}, {"groups": torch.tensor([0, 1, 1])}):
        with pytest.raises(InvalidValue, match="one of each"):
            make(**changes)
    with pytest.raises(InvalidValue, match="is in it already"):
        make(paths=["a", "b", "a"])
    with pytest.raises(InvalidValue, match="3 values"):
        make().add(torch.eye(3)[:1], ["x"], torch.tensor([1]))
    with pytest.raises(InvalidValue, match="top 0"):
        make().search(AXES[:1], top=0)


def test_other_weights_are_refused_by_their_values():
    index = make(weights={})
    index.check_weights(dict(reversed(WEIGHTS.items())))  # the order is no part of them
    others = [
        {**WEIGHTS, "b.weight": WEIGHTS["b.weight"] + 1e-6},
        {**WEIGHTS, "b.weight": WEIGHTS["b.weight"].view(3, 2)},
        {**WEIGHTS, "b.weight": WEIGHTS["b.weight"].double()},
        {"a.count": WEIGHTS["a.count"]},
        {"b.weights": WEIGHTS["b.weight"], "a.count": WEIGHTS["a.count"]},
    ]
    for other in others:
        with pytest.raises(InvalidValue, match="build the index again"):
            index.check_weights(other)
        with pytest.raises(InvalidValue, match="build the index again"):
            make(weights=other)


def test_training_that_goes_on_changes_nothing(tmp_path):
    weights = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    make(weights=weights).save(tmp_path / "index")
    weights["b.weight"] += 1
    again = Index.load(tmp_path / "index")
    again.check_weights(WEIGHTS)
    assert torch.equal(again.weights["b.weight"], WEIGHTS["b.weight"])


def test_no_silent_overwrite(tmp_path):
    make().save(tmp_path / "index")
    before = (tmp_path / "index").read_bytes()
    with pytest.raises(InvalidState, match="not overwritten"):
        make(about={}).save(tmp_path / "index")
    assert (tmp_path / "index").read_bytes() == before
    make(about={}).save(tmp_path / "index", overwrite=True)
    assert Index.load(tmp_path / "index").about == {}


def test_damaged_and_foreign_files_are_named(tmp_path):
    make().save(tmp_path / "index")
    whole = (tmp_path / "index").read_bytes()
    with pytest.raises(MissingFile, match="no index was found"):
        Index.load(tmp_path / "nothing")
    flipped = bytearray(whole)
    flipped[-70] ^= 1
    for content in (
        bytes(flipped),
        b"",
        b"<html>",
        whole[:200],
        whole[:-10],
        whole.replace(b'\\"format\\": 1', b'\\"format\\": 9'),
    ):
        (tmp_path / "index").write_bytes(content)
        with pytest.raises(InvalidValue, match="cannot be read as an index"):
            Index.load(tmp_path / "index")


def test_views_and_shared_tensors_can_be_saved(tmp_path):
    base = torch.eye(8)
    weights = {"a": base[:4], "b": base[:4], "c": base.T}
    make(weights=weights, fingerprint=weights_fingerprint(weights)).save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index")
    loaded.check_weights(weights)
    assert {name: value.tolist() for name, value in loaded.weights.items()} == {
        "a": torch.eye(8)[:4].tolist(),
        "b": torch.eye(8)[:4].tolist(),
        "c": torch.eye(8).tolist(),
    }
