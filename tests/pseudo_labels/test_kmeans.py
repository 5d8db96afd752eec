from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import adjusted_rand_score

from fastreid_uns.pseudo_labels import kmeans
from fastreid_uns.pseudo_labels.kmeans import KMeansLabels
from fastreid_uns.structures import FeatureBank


def bank_of(feats: torch.Tensor) -> FeatureBank:
    return FeatureBank(feats, torch.zeros(len(feats), dtype=torch.int64))


def groups(count: int, size: int, spread: float, d: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(count).repeat_interleave(size)
    middle = F.normalize(torch.randn(count, d, generator=generator))
    return F.normalize(middle[truth] + spread * torch.randn(len(truth), d, generator=generator)), truth


def test_separate_groups_are_found():
    feats, truth = groups(6, 20, 0.02)
    pseudo = KMeansLabels(num_clusters=6)(bank_of(feats), 0)
    assert adjusted_rand_score(truth, pseudo.labels) == 1


def test_result_is_a_fixed_point_each_image_at_its_nearest_centroid():
    feats, _ = groups(10, 30, 0.3)
    pseudo = KMeansLabels(num_clusters=12, iterations=200)(bank_of(feats), 0)
    for i, label in enumerate(pseudo.labels):
        assert max(float(feats[i] @ c) for c in pseudo.centroids) == pytest.approx(
            float(feats[i] @ pseudo.centroids[label]), abs=1e-6
        )
    for label in range(12):
        mean = feats[pseudo.labels == label].mean(0)
        torch.testing.assert_close(pseudo.centroids[label], mean / mean.norm())


def test_more_iterations_bring_images_closer():
    feats, _ = groups(10, 30, 0.6)
    fits = []
    for iterations in (1, 2, 5, 50):
        pseudo = KMeansLabels(num_clusters=10, iterations=iterations)(bank_of(feats), 0)
        fits.append(float((feats * pseudo.centroids[pseudo.labels]).sum()))
    assert fits == sorted(fits)
    assert fits[0] < fits[-1]


def test_seed_decides_and_epoch_does_not():
    bank = bank_of(groups(8, 20, 0.8)[0])
    first = KMeansLabels(num_clusters=8, iterations=1)(bank, 0)
    assert torch.equal(first.labels, KMeansLabels(num_clusters=8, iterations=1)(bank, 3).labels)
    assert not torch.equal(first.labels, KMeansLabels(num_clusters=8, iterations=1, seed=1)(bank, 0).labels)


def test_the_draws_of_training_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    KMeansLabels(num_clusters=3)(bank_of(groups(3, 5, 0.1)[0]), 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("feats", [torch.ones(20, 4) / 2, torch.zeros(20, 4), torch.eye(4).repeat(5, 1)])
def test_doubles_leave_no_cluster_empty(feats):
    pseudo = KMeansLabels(num_clusters=7)(bank_of(feats), 0)
    assert pseudo.sizes.min() >= 1
    assert pseudo.sizes.sum() == 20
    assert pseudo.centroids.isfinite().all()


def test_an_empty_cluster_takes_the_worst_placed_image_of_a_larger_one():
    feats = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.9], [-1.0, 0.5]]))
    means = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    # Image 3 sits alone in cluster 1, so image 2, at 0.74 of cluster 0, is the worst that can be spared.
    assert kmeans._assign(feats, means).tolist() == [0, 0, 2, 1]


def test_as_many_clusters_as_images():
    pseudo = KMeansLabels(num_clusters=12)(bank_of(groups(12, 1, 0.0)[0]), 0)
    assert sorted(pseudo.labels.tolist()) == list(range(12))


def test_half_precision_counts_as_its_float32_values():
    feats = groups(5, 20, 0.3)[0].half()
    generator = KMeansLabels(num_clusters=5)
    assert torch.equal(generator(bank_of(feats), 0).labels, generator(bank_of(feats.float()), 0).labels)
    assert list(generator.seconds) == ["cluster"]


def test_more_clusters_than_images():
    with pytest.raises(ValueError, match=r"NUM_CLUSTERS is 500 for 20 images; .* Lower NUM_CLUSTERS"):
        KMeansLabels()(bank_of(torch.ones(20, 4)), 0)


def test_broken_features_are_refused():
    feats = torch.ones(20, 4)
    feats[4, 1] = torch.inf
    with pytest.raises(ValueError, match=r"1 of 20 rows hold NaN or infinity, the first is row 4"):
        KMeansLabels(num_clusters=2)(bank_of(feats), 0)


@pytest.mark.parametrize("key", ["num_clusters", "iterations"])
def test_counts_out_of_range(key):
    with pytest.raises(ValueError, match=rf"PSEUDO_LABELS: {key.upper()} is 0; it must be at least 1"):
        KMeansLabels(**{key: 0})
