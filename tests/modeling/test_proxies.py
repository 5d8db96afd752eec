"""Camera proxies against a plain loop, the official trainer's results, and cases worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.modeling.proxies import CameraProxies, CameraProxyLoss, camera_proxy_loss, sum_over_cameras

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("ice_*.npz"))
golden = pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)


def load(path):
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(path).items()}


def proxies_of(features, labels, cameras) -> CameraProxies:
    proxies = CameraProxies(features.shape[1]).to(features.dtype)
    proxies.features, proxies.labels, proxies.cameras = features, labels, cameras
    return proxies


def plain_loop(feats, labels, cameras, proxies, temperature, negatives, positives):
    """The definition, image by image and proxy by proxy."""
    losses = []
    for feat, label, camera in zip(feats, labels, cameras, strict=True):
        s = [float(feat @ row) / temperature for row in proxies.features]
        own = [p for p in range(len(s)) if proxies.labels[p] == label]
        chosen = [p for p in own if positives == "all" or proxies.cameras[p] != camera]
        hardest = sorted((s[p] for p in range(len(s)) if p not in own), reverse=True)[:negatives]
        if not chosen:
            losses.append(0.0)
            continue
        total = sum(math.exp(s[p]) for p in chosen) + sum(math.exp(value) for value in hardest)
        losses.append(sum(math.log(total) - s[p] for p in chosen) / len(chosen))
    return torch.tensor(losses, dtype=torch.float64)


@pytest.fixture
def case():
    """Six clusters in four cameras, of which some pairs are missing; 12 images of 5 clusters, one camera unknown."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5])
    cameras = torch.tensor([0, 1, 3, 0, 2, 1, 0, 3, 1, 2, 0, 2])
    features = F.normalize(torch.randn(12, 8, dtype=torch.float64, generator=generator))
    feats = F.normalize(torch.randn(10, 8, dtype=torch.float64, generator=generator))
    return feats, torch.arange(10) % 5, torch.arange(10) % 4, proxies_of(features, labels, cameras)


@golden
def test_official_trainer(path):
    """`coordinates` is what the released code computes, also where it has fewer than 50 negatives (ice_02)."""
    z = load(path)
    raw = z["in_f1"].requires_grad_()
    proxies = proxies_of(z["in_proxies"], z["in_proxy_label"], z["in_proxy_cam"])
    keys = {"temperature": float(z["par_beta"]), "negatives": int(z["par_bg_knn"]), "axis": "coordinates"}
    losses = camera_proxy_loss(F.normalize(raw), z["in_labels"], z["in_cams"], proxies, **keys)
    torch.testing.assert_close(losses, z["out_cam_per_sample"], rtol=1e-10, atol=1e-12)
    total = z["par_cam_w"] * sum_over_cameras(losses, z["in_cams"])
    torch.testing.assert_close(total, z["out_loss_cam"], rtol=1e-10, atol=0)
    total.backward()
    torch.testing.assert_close(raw.grad, z["out_grad_f1_cam"], rtol=1e-8, atol=1e-12)


@golden
@pytest.mark.parametrize(("positives", "name"), [("all", "allpos"), ("other", "crosspos")])
def test_true_cosines(path, positives, name):
    z = load(path)
    proxies = proxies_of(z["in_proxies"], z["in_proxy_label"], z["in_proxy_cam"])
    for reduction in ("camsum", "batchmean_half"):
        raw = z["in_f1"].clone().requires_grad_()
        losses = camera_proxy_loss(F.normalize(raw), z["in_labels"], z["in_cams"], proxies, positives=positives)
        torch.testing.assert_close(losses, z[f"var_{name}_per_sample"], rtol=1e-10, atol=1e-12)
        total = 0.5 * (sum_over_cameras(losses, z["in_cams"]) if reduction == "camsum" else losses.mean())
        torch.testing.assert_close(total, z[f"var_{name}_{reduction}_loss"], rtol=1e-10, atol=0)
        total.backward()
        torch.testing.assert_close(raw.grad, z[f"var_{name}_{reduction}_grad_f1"], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("positives", ["all", "other"])
@pytest.mark.parametrize("negatives", [1, 3, 50])
def test_plain_loop(case, positives, negatives):
    feats, labels, cameras, proxies = case
    found = camera_proxy_loss(*case, temperature=0.2, negatives=negatives, positives=positives)
    torch.testing.assert_close(found, plain_loop(feats, labels, cameras, proxies, 0.2, negatives, positives))


def test_the_loss_passes_its_keys_on(case):
    feats, labels, cameras, proxies = case
    each = plain_loop(feats, labels, cameras, proxies, 0.2, 3, "other")
    expected = sum(each[cameras == camera].mean() for camera in cameras.unique())
    loss = CameraProxyLoss(temperature=0.2, negatives=3, positives="other")
    torch.testing.assert_close(loss(feats, labels, cameras, proxies), expected)


def test_worked_by_hand():
    """One cluster seen by cameras 0 and 1, another by camera 0; the image lies on the first proxy."""
    proxies = proxies_of(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    image = (torch.tensor([[1.0, 0]]), torch.tensor([0]), torch.tensor([0]))
    both = math.log(math.e + 1 + 1 / math.e)
    assert camera_proxy_loss(*image, proxies, temperature=1.0).item() == pytest.approx(both - 0.5)
    other = math.log(1 + 1 / math.e)
    assert camera_proxy_loss(*image, proxies, temperature=1.0, positives="other").item() == pytest.approx(other)


@pytest.mark.parametrize("keys", [{}, {"positives": "other"}, {"axis": "coordinates"}])
def test_gradient(case, keys):
    feats, labels, cameras, proxies = case
    feats.requires_grad_()

    def loss(x):
        return camera_proxy_loss(x, labels, cameras, proxies, temperature=0.3, negatives=4, **keys)

    assert torch.autograd.gradcheck(loss, feats)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(case, dtype):
    feats, labels, cameras, proxies = case
    rounded = feats.to(dtype)
    exact = camera_proxy_loss(rounded.double(), labels, cameras, proxies, negatives=4)
    found = camera_proxy_loss(rounded, labels, cameras, proxies.float(), negatives=4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact.float(), rtol=1e-4, atol=1e-4)


def test_order_of_the_batch_does_not_matter(case):
    feats, labels, cameras, proxies = case
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    losses = camera_proxy_loss(*case)
    mixed = camera_proxy_loss(feats[order], labels[order], cameras[order], proxies)
    torch.testing.assert_close(mixed, losses[order])
    torch.testing.assert_close(sum_over_cameras(mixed, cameras[order]), sum_over_cameras(losses, cameras))


@pytest.mark.parametrize("axis", ["cosine", "coordinates"])
def test_one_cluster_seen_by_one_camera(axis):
    """No negative, and with `other` no positive either: the loss and its gradient are 0."""
    proxies = proxies_of(torch.tensor([[1.0, 0]]), torch.tensor([0]), torch.tensor([2]))
    for positives in ("all", "other"):
        feats = torch.tensor([[0.6, 0.8]], requires_grad=True)
        keys = {"positives": positives, "axis": axis}
        loss = camera_proxy_loss(feats, torch.tensor([0]), torch.tensor([2]), proxies, **keys)
        loss.sum().backward()
        # the released code takes the positive as its own negative: -log 1/2
        expected = math.log(2) if (positives, axis) == ("all", "coordinates") else 0.0
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(feats.grad, torch.zeros(1, 2), rtol=0, atol=1e-4)


def test_an_image_of_unknown_camera_costs_nothing(case):
    feats, labels, cameras, proxies = case
    unknown = torch.where(torch.arange(10) < 3, -1, cameras)
    expected = camera_proxy_loss(*case)
    expected[:3] = 0
    torch.testing.assert_close(camera_proxy_loss(feats, labels, unknown, proxies), expected)


def test_sum_over_cameras_by_hand():
    losses = torch.tensor([1.0, 2.0, 6.0, 5.0])
    assert sum_over_cameras(losses, torch.tensor([4, 0, 4, 2])).item() == pytest.approx((1 + 6) / 2 + 2 + 5)


def test_proxies_are_unit_means_of_pairs():
    feats = torch.tensor([[1.0, 0], [0, 1], [0, 1], [0.6, 0.8], [1, 0], [0, 1]])
    labels = torch.tensor([1, 1, 0, 0, -1, 1])
    cameras = torch.tensor([2, 2, 0, 5, 0, -1])
    proxies = CameraProxies(2)
    proxies.reset(feats, labels, cameras)
    assert proxies.labels.tolist() == [0, 0, 1]
    assert proxies.cameras.tolist() == [0, 5, 2]
    expected = torch.tensor([[0.0, 1.0], [0.6, 0.8], [math.sqrt(0.5), math.sqrt(0.5)]])
    torch.testing.assert_close(proxies.features, expected)


def test_a_checkpoint_of_another_row_count_loads(case):
    proxies = case[3].float()
    other = CameraProxies(8)
    other.reset(F.normalize(torch.ones(2, 8)), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    other.load_state_dict(proxies.state_dict())
    for (_, found), (_, expected) in zip(other.named_buffers(), proxies.named_buffers(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("labels", "cameras"), [([0, 0, 1], [-1, -1, -1]), ([0, -1, -1], [-1, 3, 3]), ([0, 0, -1], [2, 2, 1])]
)
def test_data_without_cameras_are_refused(labels, cameras):
    """All cameras unknown, all but those of outliers, or one camera only."""
    with pytest.raises(ValueError, match=r"known camera\(s\); two or more.*Train on a data set with cameras"):
        CameraProxies(2).reset(torch.ones(3, 2), torch.tensor(labels), torch.tensor(cameras))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"positives": "own"}, "POSITIVES is 'own'; accepted: all, other"),
        ({"axis": "rows"}, "AXIS is 'rows'; accepted: cosine, coordinates"),
        ({"negatives": 0}, "NEGATIVES is 0; 1 or more"),
        ({"temperature": 0.0}, "TEMPERATURE is 0.0"),
    ],
)
def test_bad_keys(case, keys, message):
    with pytest.raises(ValueError, match=message):
        camera_proxy_loss(*case, **keys)
