from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from sklearn.cluster import DBSCAN

from fastreid_uns.pseudo_labels.base import centroids
from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels, dbscan
from fastreid_uns.pseudo_labels.jaccard import jaccard_distance
from fastreid_uns.structures import FeatureBank

GOLDEN = Path(__file__).parents[1] / "golden"


def bank_of(feats: torch.Tensor) -> FeatureBank:
    return FeatureBank(feats, torch.zeros(len(feats), dtype=torch.int64))


def random_bank(n: int, d: int = 16) -> FeatureBank:
    return bank_of(F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(0))))


def sparse(distance: np.ndarray) -> csr_matrix:
    rows, columns = np.nonzero(distance < 1)
    return csr_matrix((distance[rows, columns], (rows, columns)), shape=distance.shape)


def chain(*pairs: tuple[int, int], n: int) -> csr_matrix:
    """Points at distance 0.5 from one another where a pair says so, else at 1."""
    distance = np.ones((n, n), np.float32)
    np.fill_diagonal(distance, 0)
    for a, b in pairs:
        distance[a, b] = distance[b, a] = 0.5
    return sparse(distance)


@pytest.mark.parametrize("min_samples", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_scikit_learn(min_samples, dtype):
    rng = np.random.default_rng(min_samples)
    seen = set()
    for eps in (0.1, 0.3, 0.5, 0.6, 0.7):
        for n in (1, 23, 150):
            points = rng.random((n, 2))
            distance = np.abs(points[:, None] - points[None]).max(2)
            distance = np.minimum(np.round(distance * (n**0.5) / 6, 1), 1).astype(dtype)  # tenths: many equal eps
            found = dbscan(sparse(distance), eps, min_samples)
            expected = DBSCAN(eps=eps, min_samples=min_samples, metric="precomputed").fit_predict(distance)
            assert found.tolist() == expected.tolist()
            seen |= set(expected.tolist())
    assert {0, 1} <= seen


def test_a_contested_border_point_goes_to_the_first_cluster():
    # 0 lies between the cores 1 (with 2, 3) and 4 (with 5, 6) and is itself no core.
    graph = chain((1, 2), (1, 3), (2, 3), (4, 5), (4, 6), (5, 6), (0, 1), (0, 4), n=7)
    assert dbscan(graph, 0.5, 4).tolist() == [0, 0, 0, 0, 1, 1, 1]
    graph = chain((1, 2), (1, 3), (2, 3), (4, 5), (4, 6), (5, 6), (0, 4), n=7)
    assert dbscan(graph, 0.5, 4).tolist() == [0, -1, -1, -1, 0, 0, 0]


def test_a_cluster_may_keep_fewer_than_min_samples():
    # 3 and 4 are borders of both cores, 0 and 5; the first takes them, so 5 keeps itself and 6 alone.
    graph = chain((0, 1), (0, 3), (0, 4), (5, 3), (5, 4), (5, 6), n=7)
    assert dbscan(graph, 0.5, 4).tolist() == [0, 0, -1, 0, 0, 1, 1]


def test_the_point_itself_counts_even_if_its_zero_is_not_stored():
    graph = chain((0, 1), (1, 2), n=3)
    graph.setdiag(0)
    graph.eliminate_zeros()
    assert dbscan(graph, 0.5, 3).tolist() == [0, 0, 0]
    assert dbscan(graph, 0.5, 4).tolist() == [-1, -1, -1]
    assert dbscan(graph, 0.499, 2).tolist() == [-1, -1, -1]


@pytest.mark.parametrize("n", [60, 200, 400])
@pytest.mark.parametrize("eps", [0.4, 0.5, 0.6, 0.7])
def test_labels_of_the_official_code(n, eps):
    case = np.load(GOLDEN / f"jaccard_n{n}.npz")
    feats = torch.from_numpy(case["features"])
    generator = DBSCANLabels(eps=eps, min_samples=4, k1=int(case["k1"]), k2=int(case["k2"]))
    pseudo = generator(bank_of(feats), 0)
    assert pseudo.labels.tolist() == case[f"labels_eps0{eps * 100:.0f}"].tolist()
    assert torch.equal(pseudo.centroids, centroids(feats, pseudo.labels))
    assert set(generator.seconds) == {"neighbours", "cluster"}
    assert min(generator.seconds.values()) > 0


def test_one_distance_serves_several_radii():
    case = np.load(GOLDEN / "jaccard_n200.npz")
    distance = jaccard_distance(torch.from_numpy(case["features"]), 20, 6, max_distance=0.7)
    for eps in (0.4, 0.5, 0.6, 0.7):
        assert dbscan(distance, eps, 4).tolist() == case[f"labels_eps0{eps * 100:.0f}"].tolist()


def test_all_outliers_names_the_radius_and_the_distance_that_would_do():
    feats = random_bank(200).feats
    distance = np.ones((200, 200), np.float32)
    pairs = jaccard_distance(feats, 10, 3).tocoo()
    distance[pairs.row, pairs.col] = pairs.data
    median = np.median(np.sort(distance, 1)[:, 3])
    assert 0.1 < median < 1
    message = (
        rf"PSEUDO_LABELS: every one of 200 images is an outlier at EPS 0\.10; the 4th nearest distance, counting the "
        rf"image itself, has median {median:.2f}\. Raise EPS or lower MIN_SAMPLES\."
    )
    with pytest.raises(ValueError, match=message):
        DBSCANLabels(eps=0.1, k1=10, k2=3)(bank_of(feats), 0)
    with pytest.raises(ValueError, match="the 12th nearest distance"):
        DBSCANLabels(eps=0.1, min_samples=12, k1=10, k2=3)(bank_of(feats), 0)


def test_all_outliers_of_a_large_set_are_judged_by_a_sample():
    with pytest.raises(ValueError, match=r"every one of 2,500 images .* has median 0\.\d\d"):
        DBSCANLabels(eps=0.01, k1=5, k2=2)(random_bank(2500), 0)


def test_broken_features_are_refused():
    bank = random_bank(50)
    bank.feats[3] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 50 rows hold NaN or infinity, the first is row 3"):
        DBSCANLabels(k1=10)(bank, 0)


@pytest.mark.parametrize("eps", [0, -0.1, 1, 1.5])
def test_radius_out_of_range(eps):
    with pytest.raises(ValueError, match=rf"PSEUDO_LABELS: EPS is {eps}; it must lie between 0 and 1"):
        DBSCANLabels(eps=eps)


@pytest.mark.parametrize(("key", "value", "least"), [("MIN_SAMPLES", 0, 1), ("K1", 1, 2), ("K2", 0, 1)])
def test_counts_out_of_range(key, value, least):
    with pytest.raises(ValueError, match=rf"PSEUDO_LABELS: {key} is {value}; it must be at least {least}"):
        DBSCANLabels(**{key.lower(): value})


def test_outliers_become_clusters_of_one_image():
    bank = random_bank(200)
    dropped = DBSCANLabels(eps=0.5, k1=10, k2=3)(bank, 0).labels
    kept = DBSCANLabels(eps=0.5, k1=10, k2=3, outliers="singletons")(bank, 0)
    inside = dropped >= 0
    assert 0 < int(inside.sum()) < 200
    assert torch.equal(kept.labels[inside], dropped[inside])
    assert kept.num_clusters == int(dropped.max()) + 1 + int((~inside).sum())
    assert (kept.sizes[int(dropped.max()) + 1 :] == 1).all()
    with pytest.raises(ValueError, match="OUTLIERS is 'keep'; accepted: drop, singletons"):
        DBSCANLabels(outliers="keep")
