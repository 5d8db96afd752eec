"""Self-paced labels: the published code's numbers, the definition with sets, clusters worked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastreid_uns.projects.SpCL.labels import SelfPacedLabels, best_of_label, independence_bound, overlap
from fastreid_uns.projects.SpCL.memory import HybridMemory
from fastreid_uns.pseudo_labels.base import singletons
from fastreid_uns.pseudo_labels.dbscan import dbscan
from fastreid_uns.pseudo_labels.jaccard import jaccard_distance
from fastreid_uns.structures import FeatureBank, NoClusters

GOLDEN = Path(__file__).parent / "golden"
DISTANCES = Path(__file__).parents[3] / "tests/golden"
CASES = [(n, case) for n in (60, 200, 400) for case in ("c0", "c1", "c2", "c3", "c4")]


def golden(n: int, case: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"spcl_refine_n{n}.npz") as file:
        keys = [key for key in file.files if key.startswith(f"{case}_")]
        return {key[3:]: torch.from_numpy(np.asarray(file[key])) for key in keys}


def generator_of(case: str, expected: dict[str, torch.Tensor], **keys) -> SelfPacedLabels:
    """c3 and c4 carry the threshold of an earlier epoch."""
    generator = SelfPacedLabels(eps=round(float(expected["eps"]), 4), gap=round(float(expected["eps_gap"]), 4), **keys)
    if case in ("c3", "c4"):
        generator.load_state_dict({"bound": float(expected["indep_thres"])})
    return generator


@pytest.mark.parametrize(("n", "case"), CASES)
def test_criteria_of_the_published_code(n, case):
    expected = golden(n, case)
    tight, normal, loose = (expected[f"labels_{name}"].long() for name in ("tight", "normal", "loose"))
    whole = singletons(normal)
    for name, other in (("comp", tight), ("indep", loose)):
        found = 1 - overlap(whole, singletons(other))
        torch.testing.assert_close(found.float(), expected[f"R_{name}"], rtol=0, atol=1e-6)
        found = 1 - best_of_label(whole, overlap(whole, singletons(other)))
        torch.testing.assert_close(found.float(), expected[f"label_R_{name}"], rtol=0, atol=1e-6)
    generator = generator_of(case, expected)
    stays = generator._stays(tight, normal, loose)
    assert generator.bound == pytest.approx(float(expected["indep_thres"]), abs=1e-6)
    # the published code numbers what stands alone by a running counter, and leaves gaps
    refined = torch.where(stays, whole, int(whole.max()) + (~stays).cumsum(0))
    assert refined.tolist() == expected["refined_labels"].tolist()


def features(n: int) -> tuple[torch.Tensor, dict[str, int]]:
    with np.load(DISTANCES / f"jaccard_n{n}.npz") as file:
        return torch.from_numpy(file["features"]), {key: int(file[key]) for key in ("k1", "k2")}


def bank_of(feats: torch.Tensor) -> FeatureBank:
    return FeatureBank(feats, torch.zeros(len(feats), dtype=torch.int64))


def in_order(labels: torch.Tensor) -> list[int]:
    """The same partition, its labels numbered by their first image."""
    seen: dict[int, int] = {}
    return [seen.setdefault(label, len(seen)) for label in labels.tolist()]


@pytest.mark.parametrize("n", [60, 200, 400])
def test_distances_of_the_published_code(n):
    feats, keys = features(n)
    with np.load(DISTANCES / f"jaccard_n{n}.npz") as file:
        expected = file["dist"]
    pairs = jaccard_distance(feats, **keys).tocoo()
    found = np.ones((n, n), np.float32)
    found[pairs.row, pairs.col] = pairs.data
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("n", "case"), CASES)
def test_labels_of_the_published_code_from_features(n, case):
    expected, (feats, keys) = golden(n, case), features(n)
    generator = generator_of(case, expected, **keys)
    first = generator.bound is None
    pseudo = generator(bank_of(feats), 0)
    assert in_order(pseudo.labels) == in_order(expected["refined_labels"])
    if first:
        assert generator.bound == pytest.approx(float(expected["indep_thres"]), abs=1e-6)
    distance = jaccard_distance(feats, keys["k1"], keys["k2"])
    for name, radius in (("tight", -generator.gap), ("normal", 0.0), ("loose", generator.gap)):
        found = torch.from_numpy(dbscan(distance, generator.eps + radius, generator.min_samples))
        assert torch.equal(found < 0, expected[f"labels_{name}"] < 0)
        assert in_order(found[found >= 0]) == in_order(expected[f"labels_{name}"][found >= 0])
    assert int((pseudo.sizes > 1).sum()) == int(expected["num_clusters"])
    assert int((pseudo.sizes == 1).sum()) == int(expected["num_unclustered"])
    feats_of = [feats[pseudo.labels == label].double().mean(0) for label in range(pseudo.num_clusters)]
    torch.testing.assert_close(
        pseudo.centroids.double(), torch.stack([f / f.norm() for f in feats_of]), rtol=0, atol=1e-6
    )


def test_labels_of_memory_rows_of_the_published_code():
    with np.load(GOLDEN / "spcl_refine_n60.npz") as file:
        sources, expected = int(file["uda_source_classes"]), torch.from_numpy(file["uda_memory_labels"])
    feats, keys = features(60)
    pseudo = generator_of("c1", golden(60, "c1"), **keys)(bank_of(feats), 0)
    bank = bank_of(feats)
    bank.source_feats, bank.source_labels = feats[:sources], torch.arange(sources)
    memory = HybridMemory(feats.shape[1])
    memory.reset(pseudo, bank)
    assert in_order(memory.row_labels) == in_order(expected)


def test_overlap_of_sets():
    generator = torch.Generator().manual_seed(0)
    labels, others = (torch.randint(0, high, (60,), generator=generator) for high in (5, 8))
    sets = [
        [set((every == label).nonzero().flatten().tolist()) for label in every.tolist()] for every in (labels, others)
    ]
    expected = [len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)]
    assert overlap(labels, others).tolist() == expected
    best = [max(e for e, own in zip(expected, labels.tolist(), strict=True) if own == label) for label in range(5)]
    assert best_of_label(labels, overlap(labels, others)).tolist() == best


@pytest.mark.parametrize(
    ("count", "place"),
    [(1, 0), (2, 1), (5, 4), (15, 14), (16, 14), (25, 22), (35, 32), (100, 90)],  # halves: 4.5, 22.5 and 31.5 to even
)
def test_bound_is_the_value_at_nine_tenths(count, place):
    values = torch.arange(count).double()[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    assert independence_bound(values, 0.9) == place


def test_bound_of_no_cluster_and_of_a_whole_share():
    assert independence_bound(torch.zeros(0), 0.9) is None
    assert independence_bound(torch.arange(20.0), 1.0) == 19


# Images 0..3 and 4..7 are clusters, 8 is an outlier.
NORMAL = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, -1])
# The tighter radius loses image 3; the looser one joins 8 to the second cluster.
TIGHT = torch.tensor([0, 0, 0, -1, 1, 1, 1, 1, -1])
LOOSE = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1])


def stays(generator: SelfPacedLabels, tight=TIGHT, normal=NORMAL, loose=LOOSE) -> list[int]:
    return generator._stays(tight, normal, loose).nonzero().flatten().tolist()


def test_an_image_outside_of_the_tight_part_stands_alone():
    generator = SelfPacedLabels()
    kept = generator._stays(TIGHT, NORMAL, LOOSE)
    # overlaps at the looser radius: 4/4 and 4/5, so the bound is 0.2 and both pass; image 8 itself has 1/5
    assert generator.bound == pytest.approx(0.2)
    assert kept.tolist() == [True, True, True, False, True, True, True, True, False]
    assert generator._numbered(kept, NORMAL).tolist() == [0, 0, 0, 2, 1, 1, 1, 1, 3]


def test_a_cluster_that_a_looser_radius_swallows_dissolves_by_the_bound_of_the_first_epoch():
    generator = SelfPacedLabels()
    generator._stays(TIGHT, NORMAL, LOOSE)
    joined = torch.zeros(9, dtype=torch.int64)  # overlap 4/9: 5/9 is above the bound of 0.2
    kept = generator._stays(TIGHT, NORMAL, joined)
    assert not kept.any()
    assert generator._numbered(kept, NORMAL).tolist() == list(range(9))
    fresh = SelfPacedLabels()
    assert stays(fresh, loose=joined) == [0, 1, 2, 4, 5, 6, 7]  # in a first epoch they would set the bound themselves


def test_gaps_of_dissolved_clusters_are_closed():
    generator = SelfPacedLabels()
    generator.load_state_dict({"bound": 0.1})
    kept = generator._stays(NORMAL, NORMAL, torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1]))
    assert not kept.any()
    kept = generator._stays(NORMAL, NORMAL, torch.tensor([0, 0, 0, -1, 1, 1, 1, 1, 0]))
    assert generator._numbered(kept, NORMAL).tolist() == [1, 2, 3, 4, 0, 0, 0, 0, 5]


def test_a_cluster_that_is_gone_at_the_tighter_radius_stays_whole():
    tight = torch.tensor([-1, -1, -1, -1, 0, 0, 1, 1, -1])
    assert stays(SelfPacedLabels(), tight=tight) == [0, 1, 2, 3, 4, 5, 6, 7]  # so do two equal halves


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"compactness": False}, [0, 1, 2, 3, 8]),
        ({"independence": False}, [0, 1, 2, 4, 5, 6, 7, 8]),
        ({"independence": False, "compactness": False}, list(range(9))),
    ],
)
def test_each_criterion_can_be_left_out(keys, expected):
    generator = SelfPacedLabels(**keys)
    generator.load_state_dict({"bound": 0.25})
    loose = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, -1])  # overlaps 4/6 of the first, at best 2/4 of the second
    loose[6:8] = 2
    assert stays(generator, loose=loose) == expected


def test_outliers_and_rejected_images_are_dropped():
    feats, keys = features(200)
    alone = SelfPacedLabels(gap=0.1, **keys)(bank_of(feats), 0)
    dropped = SelfPacedLabels(gap=0.1, outliers="drop", **keys)(bank_of(feats), 0)
    single = alone.sizes[alone.labels] == 1
    assert 0 < int(single.sum()) < 200
    assert dropped.labels.tolist() == torch.where(single, -1, alone.labels).tolist()
    assert dropped.num_clusters == int(golden(200, "c1")["num_clusters"])


def test_without_both_criteria_the_labels_are_those_of_dbscan():
    feats, keys = features(400)
    plain = {"independence": False, "compactness": False, "outliers": "drop"}
    pseudo = SelfPacedLabels(**plain, **keys)(bank_of(feats), 0)
    assert pseudo.labels.tolist() == golden(400, "c0")["labels_normal"].tolist()


def test_a_resumed_generator_keeps_the_bound_of_its_first_epoch():
    feats, keys = features(400)
    first = SelfPacedLabels(gap=0.1, **keys)
    assert first.state_dict() == {}
    first(bank_of(feats), 0)
    assert first.state_dict() == {"bound": pytest.approx(float(golden(400, "c1")["indep_thres"]), abs=1e-6)}
    other = torch.nn.functional.normalize(
        feats + 0.05 * torch.randn(feats.shape, generator=torch.Generator().manual_seed(1))
    )
    resumed = SelfPacedLabels(gap=0.1, **keys)
    resumed.load_state_dict(first.state_dict())
    assert torch.equal(resumed(bank_of(other), 1).labels, first(bank_of(other), 1).labels)
    assert resumed.state_dict() == first.state_dict()


def test_no_cluster_at_all(caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    feats, keys = features(60)
    generator = SelfPacedLabels(min_samples=61, **keys)
    pseudo = generator(bank_of(feats), 0)
    assert pseudo.labels.tolist() == list(range(60))
    assert "every one of 60 images is an outlier at EPS 0.60" in caplog.text
    assert "Until then each image is a class of its own." in caplog.text
    assert generator.state_dict() == {}  # the bound waits for the first clusters
    with pytest.raises(NoClusters, match=r"every one of 60 images is an outlier at EPS 0\.60.*Raise EPS"):
        SelfPacedLabels(min_samples=61, outliers="drop", **keys)(bank_of(feats), 0)


def test_images_alone_set_no_bound():
    generator = SelfPacedLabels(min_samples=1)
    lone = torch.arange(5)
    assert stays(generator, lone, lone, torch.tensor([0, 0, 1, 2, 3])) == [0, 1, 2, 3, 4]
    assert generator.bound is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gap": 0.0}, "GAP is 0.0 and EPS 0.6"),
        ({"gap": 0.6}, "GAP is 0.6 and EPS 0.6"),
        ({"eps": 0.99}, "GAP is 0.02 and EPS 0.99"),
        ({"share": 0.0}, "SHARE is 0.0"),
        ({"share": 1.1}, "SHARE is 1.1"),
        ({"eps": 1.2}, "EPS is 1.2"),
    ],
)
def test_parameters_out_of_range(keys, message):
    with pytest.raises(ValueError, match=f"PSEUDO_LABELS: {message}"):
        SelfPacedLabels(**keys)


def test_neighbours_are_those_that_the_search_finds(monkeypatch):
    """A key of the parent class is not passed over."""
    feats, keys = features(60)
    generator, asked = SelfPacedLabels(**keys), []
    encoding = generator.encoding
    monkeypatch.setattr(
        generator, "encoding", lambda bank, epoch: asked.append(len(bank.feats)) or encoding(bank, epoch)
    )
    generator(bank_of(feats), 0)
    assert asked == [60]  # once for all three radii
