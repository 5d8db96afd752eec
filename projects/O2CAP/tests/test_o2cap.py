"""Positives found within the step, against the official code and a plain loop."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.config import load_config
from fastreid_uns.modeling.proxies import Proxies
from fastreid_uns.projects.CAP.memory import ProxyMemory
from fastreid_uns.projects.O2CAP.losses import OnlineProxyLoss, online_positives
from fastreid_uns.registry import LOSS_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels

HERE = Path(__file__).parent
GOLDEN = sorted((HERE / "golden").glob("o2cap_*.npz"))
METHOD = HERE.parent / "configs/method.yaml"
TERMS = {"offline": ["offline"], "online": ["online"], "both": ["offline", "online"]}


def load(path: Path) -> dict[str, torch.Tensor]:
    found = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(path).items()}
    return {key: value.float() if value.is_floating_point() else value.long() for key, value in found.items()}


def memory_of(case: dict[str, torch.Tensor]) -> ProxyMemory:
    labels, dim = case["in_labels"], case["in_features"].shape[1]
    memory = ProxyMemory(dim, momentum=float(case["par_momentum"])).train()
    pseudo = PseudoLabels(labels, torch.zeros(int(labels.max()) + 1, dim))
    memory.reset(pseudo, FeatureBank(case["in_features"], case["in_cameras"]))
    return memory


def weighted_losses(case: dict[str, torch.Tensor]) -> dict[str, tuple[torch.nn.Module, float]]:
    """The losses of `method.yaml`, with the number of negatives of a case."""
    negatives = int(case["par_negatives"])
    changes = [f"MODEL.LOSSES.{name}.NEGATIVES={negatives}" for name in ("offline", "online")]
    section = load_config(METHOD, changes).MODEL.LOSSES
    return {name: (LOSS_REGISTRY.build(loss), loss.WEIGHT) for name, loss in section.items()}


def batch_of(case: dict[str, torch.Tensor], step: int) -> Batch:
    index = case[f"in_index_step{step}"]
    raw = case[f"in_raw_step{step}"].clone().requires_grad_()
    return Batch((raw,), index, case["in_labels"][index], case["in_cameras"][index], torch.zeros_like(index))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_proxies_of_the_official_code(path):
    case = load(path)
    memory = memory_of(case)
    assert torch.equal(memory.labels, case["out_proxy_label"])
    assert torch.equal(memory.cameras, case["out_proxy_camera"])
    torch.testing.assert_close(memory.features, case["out_proxies"], rtol=0, atol=1e-6)
    images = torch.arange(len(case["in_labels"]))
    clustered = images[case["in_labels"] >= 0]
    batch = Batch((), clustered, case["in_labels"][clustered], case["in_cameras"][clustered], clustered)
    assert torch.equal(memory.rows(batch), case["out_image_proxy"][clustered])


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_two_steps_of_the_official_code(path, term):
    case = load(path)
    memory, losses = memory_of(case), weighted_losses(case)
    for step in (1, 2):
        batch = batch_of(case, step)
        feats = F.normalize(batch.views[0])
        feats.retain_grad()
        inputs = (feats, batch.labels, batch.cameras, memory.proxies)
        total = sum(weight * loss(*inputs) for name, (loss, weight) in losses.items() if name in TERMS[term])
        torch.testing.assert_close(total, case[f"out_loss_{term}_step{step}"], rtol=1e-5, atol=5e-6)
        total.backward()
        for found, key in ((batch.views[0].grad, "raw"), (feats.grad, "unit")):
            official = case[f"out_grad_{key}_{term}_step{step}"]
            torch.testing.assert_close(found, official, rtol=0, atol=3e-6 + 1e-5 * float(official.abs().max()))
        memory(feats.detach(), memory.rows(batch))
        moved = case[f"out_proxies_both_after_step{step}"]  # whatever the losses
        torch.testing.assert_close(memory.features, moved, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_online_positives_of_the_official_code(path):
    case = load(path)
    memory, (loss, _) = memory_of(case), weighted_losses(case)["online"]
    for step in (1, 2):
        batch = batch_of(case, step)
        feats, rows = F.normalize(batch.views[0].detach()), memory.rows(batch)
        own = memory.features[rows]
        positive, _ = loss.associate(feats @ memory.features.T, own @ memory.features.T, memory.proxies)
        found = torch.stack([row.nonzero().flatten() for row in positive])
        assert torch.equal(found, case[f"out_online_positives_step{step}"])
        memory(feats, rows)


def by_loop(feats, labels, cameras, proxies, positives: int, negatives: int) -> float:
    """The loss of the docstring, image by image."""
    pairs = list(zip(proxies.labels.tolist(), proxies.cameras.tolist(), strict=True))
    losses: dict[int, list[float]] = {}
    for q, pair in zip(feats, zip(labels.tolist(), cameras.tolist(), strict=True), strict=True):
        own = proxies.features[pairs.index(pair)]
        scores = [float(0.15 * (q @ row) + 0.85 * (own @ row)) for row in proxies.features]
        best = [
            max((r for r, p in enumerate(pairs) if p[1] == k), key=scores.__getitem__) for k in {p[1] for p in pairs}
        ]
        chosen = sorted(best, key=scores.__getitem__)[-positives:]
        others = sorted(set(range(len(pairs))) - set(chosen), key=scores.__getitem__)[-negatives:]
        logits = [float(q @ row) / 0.07 for row in proxies.features]
        total = math.log(sum(math.exp(logits[r]) for r in chosen + others))
        losses.setdefault(pair[1], []).append(total - sum(logits[r] for r in chosen) / len(chosen))
    return sum(sum(values) / len(values) for values in losses.values())


@pytest.mark.parametrize(("positives", "negatives"), [(3, 50), (1, 2), (2, 3), (9, 1)])
def test_fewer_cameras_or_proxies_than_asked_for_are_taken_as_they_are(positives, negatives):
    generator = torch.Generator().manual_seed(1)
    feats, rows = (F.normalize(torch.randn(n, 4, dtype=torch.float64, generator=generator)) for n in (6, 7))
    proxies = Proxies(rows, torch.tensor([0, 0, 1, 1, 2, 3, 3]), torch.tensor([0, 5, 0, 5, 5, 0, 5]))
    labels, cameras = torch.tensor([0, 0, 1, 2, 3, 3]), torch.tensor([0, 5, 0, 5, 0, 5])
    found = OnlineProxyLoss(positives=positives, negatives=negatives)(feats, labels, cameras, proxies)
    assert found.item() == pytest.approx(by_loop(feats, labels, cameras, proxies, positives, negatives), rel=1e-9)


def test_best_of_each_camera_by_hand():
    """Cameras 4 and 9 have their best in rows 1 and 2; camera 0 has row 3 only."""
    scores = torch.tensor([[0.1, 0.9, 0.5, -0.2, 0.3]])
    cameras = torch.tensor([4, 4, 9, 0, 9])
    assert online_positives(scores, cameras, 2).tolist() == [[False, True, True, False, False]]
    assert online_positives(scores, cameras, 5).tolist() == [[False, True, True, True, False]]


def test_an_image_without_a_proxy_costs_nothing():
    proxies = Proxies(torch.eye(2), torch.tensor([0, 1]), torch.tensor([0, 1]))
    feats = F.normalize(torch.tensor([[1.0, 0.5]])).requires_grad_()
    loss = OnlineProxyLoss()(feats, torch.tensor([0]), torch.tensor([1]), proxies)
    loss.backward()
    assert loss.item() == 0
    assert feats.grad.abs().sum() == 0


@pytest.mark.parametrize("key", ["temperature", "positives", "negatives"])
def test_keys_out_of_range(key):
    with pytest.raises(ValueError, match=f"{key.upper()} is 0"):
        OnlineProxyLoss(**{key: 0})
    with pytest.raises(ValueError, match="OWN_WEIGHT is 2"):
        OnlineProxyLoss(own_weight=2)
