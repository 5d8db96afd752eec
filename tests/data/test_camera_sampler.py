"""The batches of ICE: every camera first, then the rest of the cluster."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
import torch

from fastreid_uns.data.camera_sampler import OnePerCameraSampler, draw_one_per_camera
from fastreid_uns.structures import PseudoLabels


def draw(labels, cameras, count, groups=400, cluster=0):
    """(groups,count) draws from one cluster."""
    rng = np.random.default_rng(0)
    return draw_one_per_camera(rng, np.full(groups, cluster), np.array(labels), np.array(cameras), count)


def plan(sampler, labels, cameras, epoch=0) -> np.ndarray:
    labels = torch.as_tensor(labels)
    pseudo = PseudoLabels(labels, torch.zeros(int(labels.max()) + 1, 2))
    sampler.set_epoch(epoch, pseudo, torch.as_tensor(cameras))
    return np.array(list(sampler))


def test_more_cameras_than_places_give_different_cameras():
    """Five cameras, one with most of the images: each camera is kept equally often, each of its images as well."""
    cameras = [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]
    found = draw([0] * 10, cameras, 3, groups=20_000)
    seen = np.array(cameras)[found]
    assert all(len(set(row)) == 3 for row in seen.tolist())
    share = np.bincount(seen.ravel(), minlength=5) / 20_000
    np.testing.assert_allclose(share, 3 / 5, atol=0.02)  # 0.02 is more than five standard deviations
    of_camera_0 = np.bincount(found[seen == 0], minlength=6) / (seen == 0).sum()
    np.testing.assert_allclose(of_camera_0, 1 / 6, atol=0.02)


def test_fewer_cameras_than_places_are_filled_up_without_repeats():
    cameras = np.array([7, 7, 7, 7, 3])
    found = draw([0] * 5, cameras, 4)
    for row in found:
        assert set(cameras[row[:2]]) == {3, 7}
        assert len(set(row)) == 4
    pairs = Counter(tuple(sorted(set(range(4)) - set(row))) for row in found.tolist())
    assert set(pairs) == {(0,), (1,), (2,), (3,)}  # each image of camera 7 is the one left out at times


def test_too_few_others_are_repeated_and_those_taken_are_not():
    """Two cameras, one other image: it fills both places that are left."""
    found = draw([0, 0, 0], [0, 0, 1], 4)
    for row in found.tolist():
        assert row.count(2) == 1
        other = ({0, 1} - {row[0], row[1]}).pop()
        assert row[2:] == [other, other]


def test_without_others_those_taken_are_drawn_with_repeats():
    """Two images in two cameras: four places, each filled by either of them with equal chances."""
    found = draw([0, 0], [0, 1], 4, groups=4_000)
    ones = Counter(found.sum(1).tolist())
    expected = {0: 1 / 16, 1: 4 / 16, 2: 6 / 16, 3: 4 / 16, 4: 1 / 16}
    for total, share in expected.items():
        assert ones[total] / 4_000 == pytest.approx(share, abs=0.04)


def test_a_lone_image_fills_its_group():
    assert draw([0, 1, -1], [0, 5, 5], 3, groups=2, cluster=1).tolist() == [[1, 1, 1]] * 2


def test_one_camera_gives_random_images_without_repeats():
    found = draw([0] * 4, [2] * 4, 4)
    assert all(sorted(row) == [0, 1, 2, 3] for row in found.tolist())
    assert {row[0] for row in found.tolist()} == {0, 1, 2, 3}


def test_unequal_clusters_side_by_side():
    """Every group holds its own cluster: different images where there are enough, different cameras first."""
    labels = np.array([0, 1, 1, 2, 2, 2, 2, -1, 3, 3, 3, 3, 3, 3, 3])
    cameras = np.array([4, 4, 7, 0, 0, 1, 1, 0, 9, 9, 9, 9, 9, 9, 2])
    clusters = np.random.default_rng(1).integers(0, 4, 400)
    found = draw_one_per_camera(np.random.default_rng(0), clusters, labels, cameras, 3)
    assert (labels[found] == clusters[:, None]).all()
    for cluster, row in zip(clusters, found.tolist(), strict=True):
        if cluster >= 2:
            assert len(set(row)) == 3
            assert len(set(cameras[row[:2]])) == 2
    third = found[clusters == 2, 2]
    np.testing.assert_allclose(np.bincount(third, minlength=7)[3:] / len(third), 0.25, atol=0.2)


def test_others_are_drawn_alike():
    """One camera, seven images: each image, and each ordered pair of others, equally often."""
    found = draw([0] * 7, [1] * 7, 3, groups=42_000)
    triples = Counter(map(tuple, found.tolist()))
    assert len(triples) == 7 * 6 * 5
    counts = np.array(list(triples.values()))  # 200 expected, standard deviation 14
    assert counts.min() > 130
    assert counts.max() < 270


def test_a_pass_visits_each_cluster_once_in_random_order():
    labels = torch.arange(24) % 6
    found = plan(OnePerCameraSampler(6, 0, 0, 1, batch_size=4, num_instances=2), labels, torch.zeros(24).long())
    visited = labels.numpy()[found[:, ::2]].reshape(2, 6)  # three batches of two clusters make a pass
    assert [sorted(row) for row in visited.tolist()] == [[0, 1, 2, 3, 4, 5]] * 2
    assert visited[0].tolist() != visited[1].tolist()


def test_clusters_beyond_the_last_full_batch_are_left_out_of_a_pass():
    labels = torch.arange(10) % 5
    found = plan(OnePerCameraSampler(40, 0, 0, 1, batch_size=4, num_instances=2), labels, torch.zeros(10).long())
    passes = labels.numpy()[found[:, ::2]].reshape(20, 4)
    assert all(len(set(row)) == 4 for row in passes.tolist())
    assert set(passes.ravel()) == {0, 1, 2, 3, 4}


def test_too_few_clusters_are_repeated_with_one_warning(caplog):
    sampler = OnePerCameraSampler(3, 0, 0, 1, batch_size=8, num_instances=2)
    with caplog.at_level(logging.WARNING):
        for epoch in range(2):
            assert plan(sampler, [0, 0, 1], [0, 1, 0], epoch).shape == (3, 8)
    assert [r.getMessage() for r in caplog.records if "4 places for clusters and there are 2" in r.getMessage()] != []
    assert len(caplog.records) == 1


def test_cameras_can_be_ignored():
    """Three images of camera 0 and one of camera 1: aware, camera 1 is in every pair; blind, in half of them."""
    share = {}
    for aware in (True, False):
        keys = {"batch_size": 2, "num_instances": 2, "camera_aware": aware}
        found = plan(OnePerCameraSampler(2_000, 0, 0, 1, **keys), [0] * 4, [0, 0, 0, 1])
        share[aware] = (found == 3).any(1).mean()
    assert share[True] == 1.0
    assert share[False] == pytest.approx(0.5, abs=0.06)


def test_bad_keys():
    with pytest.raises(ValueError, match="NUM_INSTANCES is 0; 1 or more"):
        OnePerCameraSampler(1, 0, 0, 1, num_instances=0)
    with pytest.raises(ValueError, match=r"BATCH_SIZE 30 is no multiple of NUM_INSTANCES x processes \(4 x 1\)"):
        OnePerCameraSampler(1, 0, 0, 1, batch_size=30)
