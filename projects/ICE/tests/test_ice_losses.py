"""The losses of ICE against the official trainer, a plain float64 loop, and cases worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.modeling.losses import CrossEntropyLoss, similarity
from fastreid_uns.modeling.proxies import CameraProxies, CameraProxyLoss, CentroidMemory
from fastreid_uns.projects.ICE.losses import HardInstanceLoss, SoftInstanceLoss
from fastreid_uns.structures import FeatureBank, PseudoLabels

GOLDEN = sorted((Path(__file__).parent / "golden").glob("ice_*.npz"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def z(request) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(request.param).items()}


def losses_of(z: dict[str, torch.Tensor], raw: torch.Tensor) -> dict[str, torch.Tensor]:
    """The four weighted losses, as `method.yaml` names them, with the similarities of the released code."""
    feats, keys, weak = F.normalize(raw), F.normalize(z["in_k2"]), F.normalize(z["in_kweak"])
    proxies = CameraProxies(raw.shape[1]).double()
    proxies.features, proxies.labels, proxies.cameras = z["in_proxies"], z["in_proxy_label"], z["in_proxy_cam"]
    logits = raw @ z["in_centers"].T / z["par_tau_c"]
    camera = CameraProxyLoss(temperature=float(z["par_beta"]), negatives=int(z["par_bg_knn"]), axis="coordinates")
    return {
        "ccl": CrossEntropyLoss(smoothing=float(z["par_smooth"]))(logits, z["in_labels"]),
        "vcl": HardInstanceLoss(temperature=float(z["par_tau_v"]))(feats, keys, z["in_labels"]),
        "kl": z["par_kl_w"] * SoftInstanceLoss(temperature=float(z["par_tau_s"]))(feats, keys, weak),
        "cam": z["par_cam_w"] * camera(feats, z["in_labels"], z["in_cams"], proxies),
    }


@pytest.mark.parametrize("name", ["ccl", "vcl", "kl", "cam"])
def test_official_trainer(z, name):
    raw = z["in_f1"].requires_grad_()
    loss = losses_of(z, raw)[name]
    torch.testing.assert_close(loss, z[f"out_loss_{name}"], rtol=1e-10, atol=0)
    loss.backward()
    torch.testing.assert_close(raw.grad, z[f"out_grad_f1_{name}"], rtol=1e-8, atol=1e-12)


def test_official_total(z):
    raw = z["in_f1"].requires_grad_()
    loss = sum(losses_of(z, raw).values())
    torch.testing.assert_close(loss, z["out_loss_total"], rtol=1e-10, atol=0)
    loss.backward()
    torch.testing.assert_close(raw.grad, z["out_grad_f1_total"], rtol=1e-8, atol=1e-12)


def test_parts_of_the_instance_losses(z):
    feats, keys, weak = (F.normalize(z[name]) for name in ("in_f1", "in_k2", "in_kweak"))
    same = z["in_labels"][:, None] == z["in_labels"]
    hardest = similarity(feats, keys).masked_fill(~same, torch.inf).amin(1)
    torch.testing.assert_close(hardest, z["out_hardpos_sim"], rtol=1e-10, atol=1e-12)
    teacher = (similarity(weak, weak) / z["par_tau_s"]).softmax(1)
    torch.testing.assert_close(teacher, z["out_teacher_probs"], rtol=1e-10, atol=1e-12)


def test_memory_gives_the_logits_of_the_official_trainer(z):
    memory = CentroidMemory(z["in_f1"].shape[1], temperature=float(z["par_tau_c"])).train()
    memory.features = z["in_centers"].float()
    logits = memory(z["in_f1"].float(), z["in_labels"])
    torch.testing.assert_close(logits.double(), z["in_f1"] @ z["in_centers"].T / 0.5, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        CrossEntropyLoss(smoothing=0.1)(logits, z["in_labels"]).double(), z["out_loss_ccl"], rtol=0, atol=1e-4
    )


@pytest.fixture
def views() -> tuple[torch.Tensor, ...]:
    """Unit features of 9 images in three views, labels with groups of 4, 3 and 2."""
    generator = torch.Generator().manual_seed(0)
    feats = [F.normalize(torch.randn(9, 6, dtype=torch.float64, generator=generator)) for _ in range(3)]
    return *feats, torch.tensor([0, 1, 0, 2, 1, 0, 2, 0, 1])


@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_hard_loss_is_the_plain_loop(views, temperature):
    feats, keys, _, labels = views
    total = 0.0
    for i in range(9):
        s = [float(feats[i] @ keys[j]) / temperature for j in range(9)]
        positive = min(s[j] for j in range(9) if labels[j] == labels[i])
        negatives = [math.exp(s[j]) for j in range(9) if labels[j] != labels[i]]
        total += math.log(math.exp(positive) + sum(negatives)) - positive
    found = HardInstanceLoss(temperature=temperature)(feats, keys, labels)
    assert found.item() == pytest.approx(total / 9, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.4, 0.7])
def test_soft_loss_is_the_plain_loop(views, temperature):
    feats, keys, weak, _ = views
    total = 0.0
    for i in range(9):
        teacher = [math.exp(float(weak[i] @ weak[j]) / temperature) for j in range(9)]
        student = [math.exp(float(feats[i] @ keys[j]) / temperature) for j in range(9)]
        for p, q in zip(teacher, student, strict=True):
            total += p / sum(teacher) * math.log(p / sum(teacher) / (q / sum(student)))
    found = SoftInstanceLoss(temperature=temperature)(feats, keys, weak)
    assert found.item() == pytest.approx(total / 9, rel=1e-10)


def test_soft_loss_is_zero_where_the_views_agree(views):
    feats, _, _, _ = views
    assert SoftInstanceLoss()(feats, feats, feats).item() == pytest.approx(0.0, abs=1e-15)


def test_hard_loss_by_hand():
    """Two images of one cluster and one of another, at right angles: the hardest key is the other image's."""
    keys = torch.eye(3)
    labels = torch.tensor([0, 0, 1])
    # s = 0 for the hardest positive of the first two and for their negative; image 2: s = 10 against 0 and 0
    expected = (2 * math.log(2) + math.log(1 + 2 * math.exp(-10))) / 3
    assert HardInstanceLoss()(torch.eye(3), keys, labels).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", [HardInstanceLoss(), SoftInstanceLoss()])
def test_gradient_reaches_the_queries_only(views, loss):
    inputs = [value.clone().requires_grad_() for value in views[:3]]

    def value(feats):
        last = views[3] if isinstance(loss, HardInstanceLoss) else inputs[2]
        return loss(feats, inputs[1], last)

    assert torch.autograd.gradcheck(value, inputs[0])
    value(inputs[0]).backward()
    assert inputs[0].grad.abs().sum() > 0
    assert inputs[1].grad is None
    assert inputs[2].grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(views, dtype):
    rounded = [value.to(dtype) for value in views[:3]]
    exact = [value.double() for value in rounded]
    for loss, last in ((HardInstanceLoss(), views[3]), (SoftInstanceLoss(), None)):
        found = loss(*rounded[:2], rounded[2] if last is None else last)
        assert found.dtype == torch.float32
        expected = loss(*exact[:2], exact[2] if last is None else last)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_autocast_does_not_round_the_similarities(views):
    feats, keys, weak, labels = (value.float() if value.is_floating_point() else value for value in views)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = HardInstanceLoss()(feats, keys, labels), SoftInstanceLoss()(feats, keys, weak)
    assert found == (HardInstanceLoss()(feats, keys, labels), SoftInstanceLoss()(feats, keys, weak))


def test_one_cluster_costs_the_hard_loss_nothing(views):
    feats = views[0].clone().requires_grad_()
    loss = HardInstanceLoss()(feats, views[1], torch.zeros(9, dtype=torch.int64))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    assert torch.isfinite(feats.grad).all()


def test_order_of_the_batch_does_not_matter(views):
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    feats, keys, weak, labels = views
    mixed = [value[order] for value in views]
    torch.testing.assert_close(
        HardInstanceLoss()(mixed[0], mixed[1], mixed[3]), HardInstanceLoss()(feats, keys, labels)
    )
    torch.testing.assert_close(SoftInstanceLoss()(*mixed[:3]), SoftInstanceLoss()(feats, keys, weak))


def test_centroids_are_plain_means_and_stay():
    feats = torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8], [0, 1]])
    labels = torch.tensor([1, 1, -1, 0])
    memory = CentroidMemory(2, temperature=0.5).train()
    memory.reset(PseudoLabels(labels, torch.eye(2)), FeatureBank(feats, torch.zeros(4)))
    before = memory.features
    torch.testing.assert_close(before, torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
    logits = memory(torch.tensor([[3.0, 4.0]]), torch.tensor([1]))
    torch.testing.assert_close(logits, torch.tensor([[8.0, 7.0]]))  # 4 / 0.5 and 3.5 / 0.5
    assert torch.equal(memory.features, before)


@pytest.mark.parametrize("kind", [HardInstanceLoss, SoftInstanceLoss, CameraProxyLoss])
def test_temperature_out_of_range(kind):
    with pytest.raises(ValueError, match="TEMPERATURE is 0"):
        kind(temperature=0)
