from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator, centroids, singletons


def test_centroids_are_unit_means_of_their_images():
    feats = F.normalize(torch.randn(50, 6, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(50) % 7 - 1
    expected = []
    for label in range(6):
        mean = sum(feats[i] for i in range(50) if labels[i] == label) / int((labels == label).sum())
        expected.append(mean / mean.norm())
    torch.testing.assert_close(centroids(feats, labels), torch.stack(expected))


def test_images_that_cancel_out_give_a_finite_centroid():
    feats = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    assert centroids(feats, torch.tensor([0, 0, 1])).tolist() == [[0, 0], [0, 1]]


def test_half_precision_is_summed_in_float32():
    feats = torch.full((5000, 2), 1.0).half()  # a half precision sum stops at 2048
    feats[3000:, 1] = -1
    found = centroids(feats, torch.zeros(5000, dtype=torch.int64))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.normalize(torch.tensor([[5000.0, 1000.0]])))


def test_outliers_alone_have_no_centroid():
    assert centroids(torch.ones(3, 2), torch.full((3,), -1)).shape == (0, 2)


def test_seconds_are_those_of_the_last_block():
    generator = PseudoLabelGenerator()
    assert generator.seconds == {}
    with generator.timed("neighbours"):
        time.sleep(0.05)
    with generator.timed("cluster"):
        pass
    assert generator.seconds["neighbours"] >= 0.05
    with generator.timed("neighbours"):
        pass
    assert 0 <= generator.seconds["neighbours"] < 0.05
    assert list(generator.seconds) == ["neighbours", "cluster"]


def test_singletons_come_after_the_clusters_in_order():
    assert singletons(torch.tensor([-1, 1, 0, -1, 1])).tolist() == [2, 1, 0, 3, 1]
    assert singletons(torch.tensor([-1, -1])).tolist() == [0, 1]
