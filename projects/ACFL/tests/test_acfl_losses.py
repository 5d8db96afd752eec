"""Losses between images, and who is whose partner."""

from __future__ import annotations

from math import exp, log

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.projects.ACFL.losses import (
    DIRECTIONS,
    class_loss,
    cluster_distribution,
    divergence,
    least_similar,
    next_of_cluster,
    similarities,
    squared_distance,
)
from fastreid_uns.projects.ACFL.tests.acfl_golden import golden


def assert_close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def pair(data):
    raw = [data[name].requires_grad_() for name in ("in_ui", "in_uj")]
    feats = [F.normalize(value) for value in raw]
    logs = [cluster_distribution(similarities(q, data["in_C"]), float(data["par_tau"])) for q in feats]
    return raw, feats, logs


@pytest.mark.parametrize("name", ["acfl_kl_01", "acfl_kl_02_tau01"])
@pytest.mark.parametrize(("direction", "key"), [("forward", "ij"), ("reverse", "ji")])
def test_reference_of_the_divergence(name, direction, key):
    data = golden(name)
    raw, _, logs = pair(data)
    assert_close(logs[0], data["out_logp_i"])
    assert_close(logs[1], data["out_logp_j"])
    loss = divergence(*logs, direction)
    assert_close(loss, data[f"out_kl_{key}"])
    assert_close(loss.mean(), data[f"out_kl_{key}_mean"])
    loss.mean().backward()
    assert_close(raw[0].grad, data[f"out_grad_ui_kl_{key}"])
    assert_close(raw[1].grad, data[f"out_grad_uj_kl_{key}"])


@pytest.mark.parametrize("name", ["acfl_kl_01", "acfl_kl_02_tau01"])
def test_symmetric_divergence_is_the_mean_of_both(name):
    data = golden(name)
    _, _, logs = pair(data)
    assert_close(divergence(*logs, "symmetric"), (data["out_kl_ij"] + data["out_kl_ji"]) / 2)


@pytest.mark.parametrize("name", ["acfl_kl_01", "acfl_kl_02_tau01"])
def test_reference_of_the_distance(name):
    data = golden(name)
    raw, feats, _ = pair(data)
    loss = squared_distance(*feats)
    assert_close(loss, data["out_dist"])
    assert_close(loss, (feats[0] - feats[1]).pow(2).sum(1))
    loss.mean().backward()
    assert_close(raw[0].grad, data["out_grad_ui_dist"])
    assert_close(raw[1].grad, data["out_grad_uj_dist"])


def test_divergence_in_plain_floats():
    first, second = [0.7, 0.2, 0.1], [0.25, 0.25, 0.5]
    expected = sum(p * log(p / q) for p, q in zip(first, second, strict=True))
    back = sum(q * log(q / p) for p, q in zip(first, second, strict=True))
    one, two = (torch.tensor([p], dtype=torch.float64).log() for p in (first, second))
    assert divergence(one, two, "forward").item() == pytest.approx(expected, rel=1e-12)
    assert divergence(one, two, "reverse").item() == pytest.approx(back, rel=1e-12)
    assert divergence(one, two, "symmetric").item() == pytest.approx((expected + back) / 2, rel=1e-12)


def test_class_loss_in_plain_floats():
    products, tau = [[0.6, 0.5, -0.1], [0.2, 0.4, 0.3]], 0.1
    expected = [
        -log(exp(row[label] / tau) / sum(exp(p / tau) for p in row))
        for row, label in zip(products, (0, 2), strict=True)
    ]
    found = class_loss(torch.tensor(products, dtype=torch.float64), torch.tensor([0, 2]), tau)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_equals_finite_differences(direction):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(3, 5, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: divergence(a.log_softmax(1), b.log_softmax(1), direction), logits)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_equal_images_and_one_cluster_cost_nothing(direction):
    logs = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).log_softmax(1)
    assert divergence(logs, logs, direction).tolist() == [0.0] * 4
    one = torch.randn(4, 1, generator=torch.Generator().manual_seed(1)).log_softmax(1)
    assert divergence(one, one.flip(0), direction).tolist() == [0.0] * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_single_precision_losses(dtype):
    generator = torch.Generator().manual_seed(0)
    feats, rows = (F.normalize(torch.randn(count, 32, generator=generator)) for count in (6, 9))
    labels = torch.arange(6)
    found = similarities(feats.to(dtype), rows)
    assert found.dtype == torch.float32
    exact = class_loss(similarities(feats, rows), labels, 0.5)
    torch.testing.assert_close(class_loss(found, labels, 0.5), exact, rtol=0.02, atol=0.02)


def test_products_under_autocast_are_in_single_precision():
    feats, rows = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)), torch.eye(8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(similarities(feats, rows), feats)


def test_the_order_of_the_batch_does_not_matter():
    data = golden("acfl_kl_01")
    _, _, logs = pair(data)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert_close(divergence(logs[0][order], logs[1][order]), data["out_kl_ij"][order])


def test_partner_is_the_next_image_of_the_cluster():
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    assert next_of_cluster(labels, torch.arange(6)).tolist() == [1, 2, 5, 4, 3, 0]


def test_partner_is_another_image_before_another_row_before_itself():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    index = torch.tensor([7, 8, 8, 3, 3, 5])
    # image 8 stands twice, so both rows look for image 7; image 3 has no other than its own second row; 5 is alone
    assert next_of_cluster(labels, index).tolist() == [1, 0, 0, 4, 3, 5]


def test_partner_of_clusters_drawn_in_random_order_is_uniform():
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(5, 5)
    for _ in range(4000):
        index = torch.randperm(5, generator=generator)[:4]
        partner = index[next_of_cluster(torch.zeros(4, dtype=torch.int64), index)]
        counts[index, partner] += 1
    assert counts.diagonal().sum() == 0
    share = counts / counts.sum(1, keepdim=True)
    torch.testing.assert_close(share, (1 - torch.eye(5)) / 4, rtol=0, atol=0.03)


def test_mined_partner_is_the_least_similar_image_of_the_cluster():
    angles = torch.tensor([0.0, 0.2, 0.9, 0.1, 2.0, 0.0])
    feats = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    index = torch.arange(6)
    assert least_similar(feats, labels, index).tolist() == [2, 2, 0, 4, 3, 5]
    index[2] = 0  # rows 0 and 2 are one image
    assert least_similar(feats, labels, index).tolist() == [1, 2, 1, 4, 3, 5]
