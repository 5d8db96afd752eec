"""The correlation loss and the batches of ICL: reference results, a plain float64 loop, cases worked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.modeling import losses
from fastreid_uns.modeling.losses import CrossEntropyLoss
from fastreid_uns.modeling.proxies import CentroidMemory
from fastreid_uns.projects.ICE.losses import similarity
from fastreid_uns.projects.ICL.losses import CorrelationLoss
from fastreid_uns.projects.ICL.sampler import IrregularSampler
from fastreid_uns.structures import PseudoLabels
from fastreid_uns.utils import comm

GOLDEN = sorted((Path(__file__).parent / "golden").glob("icl_*.npz"))
REDUCTIONS = ("sum", "row", "mean")
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def z(request) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(request.param).items()}


@reductions
def test_reference(z, reduction):
    raw = z["in_u"].requires_grad_()
    feats = F.normalize(raw)
    feats.retain_grad()
    loss = CorrelationLoss(reduction=reduction)(feats, z["in_K"], z["in_labels"])
    torch.testing.assert_close(loss, z[f"out_icl_{reduction}"], rtol=1e-10, atol=0)
    loss.backward()
    torch.testing.assert_close(feats.grad, z[f"out_grad_F_{reduction}"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(raw.grad, z[f"out_grad_u_{reduction}"], rtol=1e-8, atol=1e-12)


def test_reference_of_the_contrast_with_centroids_and_of_the_sum(z):
    raw = z["in_u"].requires_grad_()
    feats = F.normalize(raw)
    torch.testing.assert_close(similarity(feats, z["in_K"]), z["out_M"], rtol=1e-10, atol=1e-12)
    contrast = CrossEntropyLoss()(feats @ z["in_C"].T / z["par_tau"], z["in_labels"])
    torch.testing.assert_close(contrast, z["out_mcl_mean"], rtol=1e-10, atol=0)
    for of, name in ((feats, "F"), (raw, "u")):
        (slope,) = torch.autograd.grad(contrast, of, retain_graph=True)
        torch.testing.assert_close(slope, z[f"out_grad_{name}_mcl"], rtol=1e-8, atol=1e-12)
    total = contrast + CorrelationLoss(reduction="mean")(feats, z["in_K"], z["in_labels"])
    torch.testing.assert_close(total, z["out_total_mean"], rtol=1e-10, atol=0)
    total.backward()
    torch.testing.assert_close(raw.grad, z["out_grad_u_total_mean"], rtol=1e-8, atol=1e-12)


def test_memory_gives_the_logits_of_the_reference(z):
    memory = CentroidMemory(z["in_C"].shape[1], temperature=float(z["par_tau"]))
    memory.features = z["in_C"].float()
    logits = memory(z["out_F"].float(), z["in_labels"])
    loss = F.cross_entropy(logits, z["in_labels"], reduction="none")
    torch.testing.assert_close(loss.double(), z["out_mcl"], rtol=0, atol=1e-4)


@pytest.fixture
def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    feats, keys = (F.normalize(torch.randn(7, 5, dtype=torch.float64, generator=generator)) for _ in range(2))
    return feats, keys, torch.tensor([0, 1, 0, 2, 1, 0, 0])


@reductions
def test_plain_loop(pairs, reduction):
    feats, keys, labels = pairs
    total = 0.0
    for i in range(7):
        for j in range(7):
            cosine = sum(float(a * b) for a, b in zip(feats[i], keys[j], strict=True))
            total += (cosine - (1.0 if labels[i] == labels[j] else -1.0)) ** 2
    expected = total / {"sum": 1, "row": 7, "mean": 49}[reduction]
    assert CorrelationLoss(reduction=reduction)(*pairs).item() == pytest.approx(expected, rel=1e-12)


def test_worked_by_hand():
    """Two images at right angles whose keys are themselves: (1-1)^2 twice, and (0+1)^2 or (0-1)^2 twice."""
    for labels in (torch.tensor([0, 1]), torch.tensor([3, 3])):
        assert CorrelationLoss(reduction="sum")(torch.eye(2), torch.eye(2), labels).item() == 2.0


def test_opposite_clusters_cost_nothing():
    feats = torch.tensor([[1.0, 0], [1, 0], [-1, 0]])
    assert CorrelationLoss()(feats, feats, torch.tensor([0, 0, 1])).item() == 0.0


@reductions
def test_gradient_reaches_the_queries_only(pairs, reduction):
    feats, keys, labels = (value.clone() for value in pairs)
    feats.requires_grad_()
    keys.requires_grad_()
    loss = CorrelationLoss(reduction=reduction)
    assert torch.autograd.gradcheck(lambda x: loss(x, keys, labels), feats)
    loss(feats, keys, labels).backward()
    assert keys.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(pairs, dtype):
    feats, keys, labels = pairs[0].to(dtype), pairs[1].to(dtype), pairs[2]
    found = CorrelationLoss()(feats, keys, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), CorrelationLoss()(feats.double(), keys.double(), labels))


def test_autocast_does_not_round_the_cosines(pairs):
    feats, keys, labels = pairs[0].float(), pairs[1].float(), pairs[2]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CorrelationLoss()(feats, keys, labels)
    assert found == CorrelationLoss()(feats, keys, labels)


@reductions
def test_order_of_the_batch_does_not_matter(pairs, reduction):
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    loss = CorrelationLoss(reduction=reduction)
    torch.testing.assert_close(loss(*(value[order] for value in pairs)), loss(*pairs))


@reductions
def test_mean_over_processes_is_the_loss_of_the_whole_batch(pairs, reduction, monkeypatch):
    """A batch of six cut into the slices of two processes; DistributedDataParallel averages their gradients."""
    feats, keys, labels = (value[:6] for value in pairs)
    loss, whole = CorrelationLoss(reduction=reduction), feats.clone().requires_grad_()
    expected = loss(whole, keys, labels)
    expected.backward()
    every = {keys.dtype: keys, labels.dtype: labels}
    monkeypatch.setattr(comm, "world", lambda: 2)
    for module in (comm, losses):
        monkeypatch.setattr(module, "all_gather", lambda value, equal: every[value.dtype])
    slices = [feats[rows].clone().requires_grad_() for rows in (slice(3), slice(3, 6))]
    found = [loss(part, keys[rows], labels[rows]) for part, rows in zip(slices, (slice(3), slice(3, 6)), strict=True)]
    torch.testing.assert_close(torch.stack(found).mean(), expected)
    torch.stack(found).mean().backward()
    torch.testing.assert_close(torch.cat([part.grad for part in slices]), whole.grad)


def test_unknown_reduction():
    with pytest.raises(ValueError, match="REDUCTION is 'batchmean'; accepted: sum, row, mean"):
        CorrelationLoss(reduction="batchmean")


def plan(sampler: IrregularSampler, labels: torch.Tensor, cameras: torch.Tensor) -> np.ndarray:
    sampler.set_epoch(0, PseudoLabels(labels, torch.zeros(int(labels.max()) + 1, 2)), cameras)
    return np.array(list(sampler))


def test_32_images_of_12_clusters():
    """Eight clusters give three images and four give two; which ones changes, and cameras come first."""
    labels, cameras = torch.arange(240) % 24, torch.arange(240) // 24 % 3
    found = plan(IrregularSampler(50, 0, 0, 1), labels, cameras)
    assert found.shape == (50, 32)
    threes = np.zeros(24)
    for batch in found:
        clusters, counts = np.unique(labels[batch], return_counts=True)
        assert sorted(counts) == [2] * 4 + [3] * 8
        threes[clusters[counts == 3]] += 1
        for cluster in clusters:
            own = cameras[batch[labels[batch].numpy() == cluster]].tolist()
            assert len(set(own)) == len(own)  # three cameras for at most three images
    # 25 visits each, of which two thirds give three images: 16.7 with a standard deviation of 2.4
    assert threes.min() >= 5
    assert threes.max() <= 24


def test_clusters_of_a_batch_are_different_ones():
    labels = torch.arange(60) % 20
    found = plan(IrregularSampler(30, 0, 0, 1, batch_size=16, clusters=6), labels, torch.zeros(60).long())
    assert all(len(set(labels[batch].tolist())) == 6 for batch in found)


@pytest.mark.parametrize("clusters", [0, 33])
def test_number_of_clusters_out_of_range(clusters):
    with pytest.raises(ValueError, match=f"CLUSTERS is {clusters} for a BATCH_SIZE of 32; 1 to that many"):
        IrregularSampler(1, 0, 0, 1, clusters=clusters)
