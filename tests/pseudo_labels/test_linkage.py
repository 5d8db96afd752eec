"""Average linkage against scipy's on the dense matrix, and against a loop that knows constraints."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import average, fcluster
from scipy.sparse import csr_matrix
from scipy.spatial.distance import squareform

from fastreid_uns.pseudo_labels.constraints import Answer, Constraints
from fastreid_uns.pseudo_labels.linkage import (
    AverageLinkageLabels,
    average_linkage,
    multi_scale_distance,
    near_pairs,
    reach_of,
)
from fastreid_uns.structures import FeatureBank, NoClusters

sys.path.insert(0, str(Path(__file__).parent))
import dense_oracle


def sparse(dense: np.ndarray) -> csr_matrix:
    """The entries below 1 of a distance, with the diagonal."""
    rows, columns = np.nonzero(dense < 1)
    return csr_matrix((dense[rows, columns].astype(np.float32), (rows, columns)), shape=dense.shape)


def random_distance(n: int, share: float, seed: int, steps: int = 2**20) -> np.ndarray:
    """Symmetric; a share of the pairs has a distance below 1, in multiples of 1 / steps."""
    rng = np.random.default_rng(seed)
    dense = rng.integers(0, steps, (n, n)) / steps
    dense[rng.random((n, n)) > share] = 1
    dense = np.triu(dense, 1)
    return dense + dense.T


def partition(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}


def slow_linkage(dense: np.ndarray, constraints: Constraints) -> list[tuple[float, frozenset[int]]]:
    """Heights and members of all merges below 1, by looking at all pairs of clusters before each merge."""
    clusters = [frozenset([i]) for i in range(len(dense))]
    unit = constraints.unit
    apart = {frozenset(pair) for pair in constraints.cannot.tolist()}
    merges = []
    while len(clusters) > 1:
        options = [
            (dense[np.ix_(sorted(a), sorted(b))].mean(), i, j)
            for i, a in enumerate(clusters)
            for j, b in enumerate(clusters[:i])
            if not any(frozenset((int(unit[x]), int(unit[y]))) in apart for x in a for y in b)
        ]
        height, i, j = min(options, default=(1.0, 0, 0))
        if height >= 1:
            break
        merged = clusters[i] | clusters[j]
        merges.append((height, merged))
        clusters = [c for place, c in enumerate(clusters) if place not in (i, j)] + [merged]
    return merges


@pytest.mark.parametrize(
    ("n", "share", "seed"), [(2, 1, 0), (3, 1, 1), (30, 1, 2), (60, 0.3, 3), (200, 0.05, 4), (300, 0.9, 5)]
)
def test_merges_are_those_of_scipy_on_the_dense_matrix(n, share, seed):
    dense = random_distance(n, share, seed)
    expected = average(squareform(dense))
    expected = expected[expected[:, 2] < 1 - 1e-9]
    found = average_linkage(sparse(dense))
    np.testing.assert_allclose(found.heights, expected[:, 2], atol=1e-9)
    np.testing.assert_array_equal(found.sizes, expected[:, 3])
    for threshold in (0.2, 0.5, 0.8, 0.95):
        wanted = fcluster(average(squareform(dense)), threshold, "distance")
        assert partition(found.cut(threshold)) == partition(wanted)


@pytest.mark.parametrize("seed", range(5))
def test_with_ties_each_merge_is_the_nearest_that_was_left(seed):
    dense = random_distance(40, 0.6, seed, steps=4)
    tree = average_linkage(sparse(dense))
    clusters = {frozenset([i]) for i in range(40)}
    for m, height in enumerate(tree.heights):
        a, b = (frozenset(tree.members(node).tolist()) for node in tree.children[m])
        nearest = min(dense[np.ix_(sorted(x), sorted(y))].mean() for x in clusters for y in clusters if x != y)
        assert dense[np.ix_(sorted(a), sorted(b))].mean() == pytest.approx(height) == pytest.approx(nearest)
        clusters = (clusters - {a, b}) | {a | b}
        assert tree.sizes[m] == len(a | b)


def test_equal_images_merge_at_distance_zero():
    feats = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0))).repeat_interleave(5, 0)
    pseudo = AverageLinkageLabels(threshold=0.75, k1=[5], k2=1, cosine=0)(FeatureBank(feats, torch.zeros(20)), 0)
    assert pseudo.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5


@pytest.mark.parametrize("seed", range(6))
def test_constraints_are_kept_as_by_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 6, 40)
    pairs = rng.integers(0, 40, (25, 2))
    answers = [Answer(int(a), int(b), bool(truth[a] == truth[b])) for a, b in pairs if a != b]
    constraints = Constraints(40, answers)
    dense = random_distance(40, 0.5, seed)
    tree = average_linkage(sparse(dense), constraints)
    expected = slow_linkage(dense, constraints)
    np.testing.assert_allclose(tree.heights, [height for height, _ in expected], atol=1e-9)
    assert [frozenset(tree.members(40 + m).tolist()) for m in range(len(expected))] == [made for _, made in expected]
    labels = tree.cut(0.999)
    assert all(labels[answer.first] != labels[answer.second] for answer in answers if not answer.same)


def test_images_without_anything_near_stay_alone():
    tree = average_linkage(csr_matrix((5, 5), dtype=np.float32))
    assert len(tree.heights) == 0
    assert tree.cut(0.5).tolist() == [0, 1, 2, 3, 4]
    assert average_linkage(csr_matrix((1, 1), dtype=np.float32)).cut(0.5).tolist() == [0]


@pytest.mark.parametrize(("n", "labels"), [(1, [0]), (2, [0, 0]), (3, [0, 0, 0])])
def test_very_few_images(n, labels):
    feats = F.normalize(torch.ones(n, 4))
    pseudo = AverageLinkageLabels(min_size=1)(FeatureBank(feats, torch.zeros(n)), 0)
    assert pseudo.labels.tolist() == labels


def test_small_clusters_are_outliers():
    feats = F.normalize(torch.tensor([[1.0, 0], [1, 0.01], [1, 0.02], [0, 1], [-1, 0], [-1, 0.01]]))
    bank = FeatureBank(feats, torch.zeros(6))
    assert AverageLinkageLabels(threshold=0.75, k1=[2], k2=1, cosine=0, min_size=1)(bank, 0).num_clusters > 1
    with pytest.raises(NoClusters, match=r"every one of 6 images is an outlier at THRESHOLD 0.75 and MIN_SIZE 7"):
        AverageLinkageLabels(threshold=0.75, k1=[2], k2=1, cosine=0, min_size=7)(bank, 0)


@pytest.mark.parametrize(
    "keys", [{"threshold": 0}, {"threshold": 1}, {"k1": [1]}, {"k1": []}, {"cosine": 1.5}, {"k2": 0}, {"min_size": 0}]
)
def test_parameters_out_of_range_are_refused(keys):
    with pytest.raises(ValueError, match=f"PSEUDO_LABELS: {next(iter(keys)).upper()} is"):
        AverageLinkageLabels(**keys)


@pytest.mark.slow
def test_twenty_thousand_images_take_less_than_a_minute():
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(1000, 64, generator=generator)
    truth = torch.arange(1000).repeat_interleave(20)
    feats = F.normalize(middle[truth] + 0.8 * torch.randn(20_000, 64, generator=generator))
    begin = time.perf_counter()
    pseudo = AverageLinkageLabels()(FeatureBank(feats, torch.zeros(20_000)), 0)
    assert time.perf_counter() - begin < 60
    assert 900 < pseudo.num_clusters < 1200


@pytest.mark.parametrize("cosine", [0.0, 0.3])
def test_several_sizes_are_the_mean_of_dense_distances_and_the_cosine(cosine):
    feats = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
    double = feats.double().numpy()
    jaccards = [dense_oracle.jaccard(double, k1, k2) for k1, k2 in ((4, 1), (9, 3))]  # k2 is at most a third of k1
    mean = sum(np.where(one > 0.9, 1, one) for one in jaccards) / 2
    apart = mean > 1 - 1e-6
    assert 0 < apart.sum() < 40 * 39
    expected = np.where(apart, 1, (1 - cosine) * mean + cosine * np.clip(1 - double @ double.T, 0, 1))
    np.fill_diagonal(expected, 0)
    found = multi_scale_distance(feats, (9, 4), 3, cosine=cosine, max_distance=0.9)
    distances = np.ones((40, 40))
    distances[found.nonzero()] = found.data[found.data > 0]
    np.fill_diagonal(distances, 0)
    np.testing.assert_allclose(distances, expected, atol=3e-6, rtol=0)
    assert (abs(found - found.T) > 2**-19).nnz == 0


def test_near_pairs_are_those_of_a_dense_search():
    feats = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
    first, second, cosines = near_pairs(feats, 5)
    products = feats.double() @ feats.double().T
    nearest = products.topk(5).indices.tolist()
    expected = sorted({tuple(sorted((i, j))) for i in range(40) for j in nearest[i] if i != j})
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == expected
    torch.testing.assert_close(cosines.double(), products[first, second], atol=1e-6, rtol=0)


def test_a_similarity_takes_the_place_of_the_cosine():
    feats = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(0)))
    other = F.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)))
    assert reach_of((9, 40)) >= 40  # all pairs are compared
    sizes = {"k1": (9, 40), "k2": 1, "max_distance": 1.0}
    plain = multi_scale_distance(feats, **sizes).toarray()
    same = multi_scale_distance(feats, **sizes, similarity=lambda first, second, cosine: cosine).toarray()
    np.testing.assert_allclose(same, plain, atol=3e-6, rtol=0)
    expected = multi_scale_distance(other, **sizes).toarray()
    found = multi_scale_distance(feats, **sizes, similarity=lambda a, b, cosine: (other[a] * other[b]).sum(1)).toarray()
    agreed = np.corrcoef(found.ravel(), expected.ravel())[0, 1]
    assert agreed > 0.9  # members that come by expansion are still weighed by the features
    assert np.corrcoef(plain.ravel(), expected.ravel())[0, 1] < 0.7


def test_images_that_no_similarity_compares_are_far_apart():
    feats = F.normalize(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)))
    found = multi_scale_distance(feats, (5,), 1, cosine=1.0, similarity=lambda a, b, cosine: cosine).tocoo()
    first, second, cosines = near_pairs(feats, reach_of((5,)))
    near = dict(zip(zip(first.tolist(), second.tolist(), strict=True), (1 - cosines).clip(0, 1).tolist(), strict=True))
    pairs = [(a, b, d) for a, b, d in zip(found.row.tolist(), found.col.tolist(), found.data, strict=True) if a < b]
    assert any((a, b) not in near for a, b, _ in pairs)
    assert all(d == pytest.approx(near.get((a, b), 1), abs=3e-6) for a, b, d in pairs)


def test_several_sizes_are_those_that_a_small_set_has():
    feats = torch.eye(3)
    assert (multi_scale_distance(feats, (12, 25, 50)) != multi_scale_distance(feats, (3,))).nnz == 0
    with pytest.raises(ValueError, match=r"k1 is \[1\] and k2 is 6; at least 2 and 1 are accepted"):
        multi_scale_distance(feats, (1,))
