from __future__ import annotations

import logging
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.config import load_config
from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels
from fastreid_uns.pseudo_labels.search import approximate
from fastreid_uns.pseudo_labels.search.approximate import approximate_neighbours
from fastreid_uns.pseudo_labels.search.exact import nearest_neighbours
from fastreid_uns.structures import FeatureBank


def random_feats(n: int, d: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0)))


def recall_in(text: str) -> float:
    return float(text.partition(" finds ")[2].partition("%")[0])


@pytest.mark.parametrize("search", ["ivf", "hnsw"])
def test_enough_effort_finds_what_the_exact_search_finds(search, caplog):
    pytest.importorskip("faiss")
    feats = random_feats(900, 16)
    sq, index = approximate_neighbours(feats, 10, search=search, effort=900)
    exact_sq, exact = nearest_neighbours(feats, 10)
    assert torch.equal(index, exact)
    assert torch.equal(sq, exact_sq)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert recall_in(record.message) == 100
    assert "labels suffer more than that tells. Raise SEARCH_EFFORT, or set SEARCH: exact" in record.message


def test_the_recall_in_the_log_is_that_of_the_neighbours(caplog, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr(approximate, "_SAMPLE", 2000)
    feats = random_feats(2000, 24)
    sq, index = approximate_neighbours(feats, 10, search="ivf", effort=8)
    exact = nearest_neighbours(feats, 10)[1]
    kept = [len(set(a) & set(b)) for a, b in zip(index[:, 1:].tolist(), exact[:, 1:].tolist(), strict=True)]
    recall = 100 * sum(kept) / (9 * 2000)
    assert 40 < recall < 99
    assert recall_in(caplog.text) == pytest.approx(recall, abs=0.06)
    x = feats.double()
    assert torch.equal(sq, (x[:, None] - x[index]).square().sum(2).float())
    assert (index[:, 0] == torch.arange(2000)).all()


def test_candidates_of_a_search_that_finds_too_few_or_misses_the_image_itself(monkeypatch):
    feats = random_feats(60, 5)
    exact_sq, exact = nearest_neighbours(feats, 4)
    found = exact.numpy().copy()
    found[0] = [-1, found[0, 1], -1, -1]  # too few: searched exactly
    found[1, 0] = found[1, 3]  # without itself, one of the others twice as far: nothing is lost
    found[1, 3] = -1
    found[2] = found[2, ::-1]
    monkeypatch.setattr(approximate, "_found_by_faiss", lambda *args: found)
    sq, index = approximate_neighbours(feats, 4, search="ivf", effort=1)
    assert torch.equal(index, exact)
    assert torch.equal(sq, exact_sq)


def test_without_faiss_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    bank = FeatureBank(random_feats(80, 8), torch.zeros(80, dtype=torch.int64))
    message = r"SEARCH is 'hnsw', which needs faiss, and faiss is not installed\. Run `pip install faiss-cpu`"
    with pytest.raises(ImportError, match=message):
        DBSCANLabels(k1=10, search="hnsw")(bank, 0)


def test_the_generator_takes_the_search_from_the_config(tmp_path, monkeypatch):
    file = tmp_path / "a.yaml"
    file.write_text("PSEUDO_LABELS: {SEARCH: ivf, SEARCH_EFFORT: 3}")
    cfg = load_config(file)
    assert (cfg.PSEUDO_LABELS.SEARCH, cfg.PSEUDO_LABELS.SEARCH_EFFORT) == ("ivf", 3)
    asked = []

    def found_by(rows: np.ndarray, k: int, search: str, effort: int) -> np.ndarray:
        asked.append((search, effort))
        return nearest_neighbours(torch.from_numpy(rows), k)[1].numpy()

    monkeypatch.setattr(approximate, "_found_by_faiss", found_by)
    middle = F.normalize(torch.randn(10, 8, generator=torch.Generator().manual_seed(1)))
    feats = F.normalize(middle.repeat(12, 1) + 0.1 * random_feats(120, 8))
    bank = FeatureBank(feats, torch.zeros(120, dtype=torch.int64))
    exact = DBSCANLabels(k1=10)(bank, 0)
    found = DBSCANLabels(k1=10, search="ivf", search_effort=3)(bank, 0)
    assert asked == [("ivf", 3)]
    assert torch.equal(found.labels, exact.labels)


@pytest.mark.parametrize("search", ["exact", "ivf"])
def test_a_generator_that_compares_neighbours_finds_them_as_its_labels_do(search, monkeypatch):
    feats, asked = random_feats(60, 8), []

    def found_by(rows: np.ndarray, k: int, search: str, effort: int) -> np.ndarray:
        asked.append((search, effort))
        return nearest_neighbours(torch.from_numpy(rows), k)[1].numpy()

    monkeypatch.setattr(approximate, "_found_by_faiss", found_by)
    sq, index = DBSCANLabels(search=search, search_effort=5).nearest(feats, 7)
    expected_sq, expected = nearest_neighbours(feats, 7)
    assert torch.equal(index, expected)
    torch.testing.assert_close(sq, expected_sq)
    assert asked == ([] if search == "exact" else [("ivf", 5)])


def test_parameters_out_of_range():
    with pytest.raises(ValueError, match="PSEUDO_LABELS: SEARCH is 'lsh'; accepted: exact, ivf, hnsw"):
        DBSCANLabels(search="lsh")
    with pytest.raises(ValueError, match="PSEUDO_LABELS: SEARCH_EFFORT is 0; it must be at least 1"):
        DBSCANLabels(search_effort=0)
