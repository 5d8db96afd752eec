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


class FakeFaiss:
    """What is called, in order; searches by definition."""

    def __init__(self, gpus: int | None) -> None:
        self.calls: list[tuple] = []
        if gpus is not None:
            self.get_num_gpus = lambda: gpus
            self.StandardGpuResources = lambda: "resources"

    def omp_set_num_threads(self, count: int) -> None:
        pass

    def IndexFlatL2(self, d: int) -> tuple:
        return ("flat", d)

    def IndexIVFFlat(self, flat: tuple, d: int, lists: int) -> FakeIndex:
        self.calls.append(("ivf", flat, d, lists))
        return FakeIndex(self, "cpu")

    def index_cpu_to_gpu(self, resources: str, device: int, index: FakeIndex) -> FakeIndex:
        self.calls.append(("to gpu", resources, device))
        return FakeIndex(self, f"gpu {device}")


class FakeIndex:
    def __init__(self, faiss: FakeFaiss, place: str) -> None:
        self.faiss, self.place, self.nprobe = faiss, place, 1

    def train(self, rows: np.ndarray) -> None:
        self.faiss.calls.append(("train", self.place, rows.shape))

    def add(self, rows: np.ndarray) -> None:
        self.faiss.calls.append(("add", self.place, rows.shape))
        self.rows = torch.from_numpy(rows)

    def search(self, rows: np.ndarray, k: int) -> tuple[None, np.ndarray]:
        self.faiss.calls.append(("search", self.place, rows.shape, k, self.nprobe))
        return None, nearest_neighbours(self.rows, k)[1].numpy()


@pytest.mark.parametrize(
    ("gpus", "device", "effort", "place"),
    [
        pytest.param(2, "cuda:1", 7, "gpu 1", id="on the GPU of the features"),
        pytest.param(1, "cuda", 7, "gpu 0", id="on the only GPU"),
        pytest.param(2, "cpu", 7, "cpu", id="features on the CPU"),
        pytest.param(0, "cuda:0", 7, "cpu", id="faiss finds no GPU"),
        pytest.param(None, "cuda:0", 7, "cpu", id="faiss of a CPU"),
    ],
)
def test_inverted_lists_are_searched_where_the_features_are(gpus, device, effort, place, monkeypatch):
    fake = FakeFaiss(gpus)
    monkeypatch.setitem(sys.modules, "faiss", fake)
    rows = random_feats(400, 8)  # 4 sqrt(400) lists would hold 5 images each; 400 // 39 lists can be trained
    found = approximate._found_by_faiss(rows.numpy(), 5, "ivf", effort, torch.device(device))
    assert np.array_equal(found, nearest_neighbours(rows, 5)[1].numpy())
    moved = [] if place == "cpu" else [("to gpu", "resources", int(place[-1]))]
    assert fake.calls == [
        ("ivf", ("flat", 8), 8, 10),
        *moved,
        ("train", place, (400, 8)),
        ("add", place, (400, 8)),
        ("search", place, (400, 8), 5, 7),
    ]


def test_more_than_faiss_can_do_on_a_gpu_is_done_on_the_cpu(monkeypatch):
    fake = FakeFaiss(1)
    monkeypatch.setitem(sys.modules, "faiss", fake)
    monkeypatch.setattr(approximate, "_LISTS_ON_GPU", 8)
    for k, effort, place in ((5, 8, "gpu 0"), (5, 9, "cpu"), (9, 8, "cpu")):
        approximate._found_by_faiss(random_feats(400, 8).numpy(), k, "ivf", effort, torch.device("cuda"))
        assert fake.calls[-1] == ("search", place, (400, 8), k, effort)


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

    def found_by(rows: np.ndarray, k: int, search: str, effort: int, device: torch.device) -> np.ndarray:
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

    def found_by(rows: np.ndarray, k: int, search: str, effort: int, device: torch.device) -> np.ndarray:
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
