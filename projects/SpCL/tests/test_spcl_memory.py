"""The hybrid memory and the unified loss: the published code's numbers, a plain loop, numbers worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.modeling.memory import moved_once
from fastreid_uns.projects.SpCL.losses import UnifiedContrastLoss
from fastreid_uns.projects.SpCL.memory import HybridMemory
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels

GOLDEN = Path(__file__).parent / "golden"
LOSS = {"rtol": 1e-5, "atol": 2e-6}
GRADIENT = {"rtol": 0, "atol": 3e-6}
ROWS = {"rtol": 0, "atol": 1e-6}


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / f"{name}.npz") as case:
        return {key: torch.from_numpy(np.asarray(case[key])) for key in case.files}


def fill(memory, rows: torch.Tensor, labels: torch.Tensor, sources: int = 0) -> torch.Tensor:
    """Put the rows of a case into a memory; gives the label of each row, without gaps."""
    labels = labels.long().unique(return_inverse=True)[1]
    target = labels[sources:] - sources
    centroids = torch.zeros(int(target.max()) + 1, rows.shape[1])
    bank = FeatureBank(rows[sources:], torch.zeros(len(target)))
    if sources:
        bank.source_feats, bank.source_labels = rows[:sources], torch.arange(sources)
    memory.reset(PseudoLabels(target, centroids), bank)
    return labels


@pytest.mark.parametrize("name", ["usl_small", "usl_large", "all_outliers"])
def test_unlabelled_steps_of_the_published_code(name):
    case = golden(f"spcl_hybrid_{name}")
    memory = HybridMemory(case["inputs"].shape[2], temperature=float(case["temp"]), momentum=float(case["momentum"]))
    labels = fill(memory, case["memory_before"], case["labels"])
    for step, (feats, index) in enumerate(zip(case["inputs"], case["indexes"].long(), strict=True)):
        feats.requires_grad_()
        logits = memory.label_logits(memory(feats, index))
        loss = UnifiedContrastLoss(epsilon=1e-6)(logits, labels[index], torch.zeros(len(index)))
        loss.backward()
        torch.testing.assert_close(loss, case["loss"][step], **LOSS)
        torch.testing.assert_close(feats.grad, case["grad_inputs"][step], **GRADIENT)
        if step == 0:
            torch.testing.assert_close(memory.features, case["memory_after_step1"], **ROWS)
    torch.testing.assert_close(memory.features, case["memory_after"], **ROWS)


@pytest.mark.parametrize(("target_first", "gradient"), [(True, "grad_inputs"), (False, "grad_inputs_frozen_memory")])
def test_joint_step_of_the_published_code(target_first, gradient):
    case = golden("spcl_hybrid_uda")
    sources, feats = int(case["source_classes"]), case["inputs"].requires_grad_()
    keys = {"temperature": float(case["temp"]), "momentum": float(case["momentum"])}
    memory = HybridMemory(feats.shape[1], target_first=target_first, **keys)
    labels = fill(memory, case["memory_before"], case["labels"], sources)
    rows = torch.cat([case["source_targets"], case["target_indexes"] + sources]).long()
    logits = memory.label_logits(memory(feats, rows))
    domains = torch.tensor([1] * 8 + [0] * 8)
    for part, expected in ((domains > 0, "loss_source"), (domains == 0, "loss_target")):
        own = UnifiedContrastLoss(epsilon=1e-6)(logits[part], labels[rows][part], domains[part])
        torch.testing.assert_close(own, case[expected], **LOSS)
    loss = UnifiedContrastLoss(epsilon=1e-6)(logits, labels[rows], domains)
    torch.testing.assert_close(loss, case["loss_source"] + case["loss_target"], **LOSS)
    loss.backward()
    torch.testing.assert_close(feats.grad, case[gradient], **GRADIENT)
    torch.testing.assert_close(memory.features, case["memory_after"], **ROWS)


def batch_of(index, labels, domains) -> Batch:
    values = [torch.tensor(value) for value in (index, labels, domains)]
    return Batch((), values[0], values[1], torch.full_like(values[0], -1), values[2])


@pytest.fixture
def joint():
    """Two source classes, five images in clusters 0 and 1 with one image left out; steps with repeated rows."""
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(5, 4, generator=generator))
    sources = F.normalize(torch.randn(3, 4, generator=generator))
    feats = F.normalize(torch.randn(6, 4, generator=generator))
    bank = FeatureBank(rows, torch.zeros(5), source_feats=sources, source_labels=torch.tensor([0, 1, 0]))
    pseudo = PseudoLabels(torch.tensor([1, 0, -1, 1, 0]), torch.zeros(2, 4))
    batch = batch_of([6, 5, 7, 3, 1, 3], [1, 0, 0, 3, 2, 3], [1, 1, 1, 0, 0, 0])
    return bank, pseudo, batch, feats


def test_rows_and_labels_after_a_clustering(joint):
    bank, pseudo, batch, _ = joint
    memory = HybridMemory(4)
    assert memory.instances is None
    memory.reset(pseudo, bank)
    first = (bank.source_feats[0] + bank.source_feats[2]) / (bank.source_feats[0] + bank.source_feats[2]).norm()
    torch.testing.assert_close(memory.features, torch.stack([first, bank.source_feats[1], *bank.feats]))
    assert torch.equal(memory.instances, bank.feats)
    assert memory.rows(batch).tolist() == [1, 0, 0, 5, 3, 5]
    similarity = torch.arange(7.0)[None]
    # source classes: rows 0 and 1; clusters: rows 3 and 6, rows 2 and 5; row 4 has no label
    assert memory.label_logits(similarity).tolist() == [[0, 1, (3 + 6) / 2, (2 + 5) / 2]]


def test_the_next_clustering_changes_labels_and_keeps_all_rows(joint):
    bank, pseudo, batch, feats = joint
    memory = HybridMemory(4)
    memory.reset(pseudo, bank)
    memory(feats, memory.rows(batch))
    before = memory.features.clone()
    memory.reset(PseudoLabels(torch.arange(5), torch.zeros(5, 4)), FeatureBank(memory.instances, bank.cameras))
    assert torch.equal(memory.features, before)
    assert memory.label_logits(torch.arange(7.0)[None]).tolist() == [list(range(7))]


def test_rows_move_image_by_image_in_the_order_of_the_batch(joint):
    bank, pseudo, batch, feats = joint
    memory = HybridMemory(4, momentum=0.3)
    memory.reset(pseudo, bank)
    expected = memory.features.double().clone()
    for feat, row in zip(feats.double(), memory.rows(batch).tolist(), strict=True):
        moved = 0.3 * expected[row] + 0.7 * feat
        expected[row] = moved / moved.norm()
    memory(feats, memory.rows(batch))
    torch.testing.assert_close(memory.features.double(), expected, rtol=0, atol=1e-6)


def test_source_rows_move_once_towards_the_mean_of_their_images(joint):
    bank, pseudo, batch, feats = joint
    memory, plain = HybridMemory(4, momentum=0.3, source_mean=True), HybridMemory(4, momentum=0.3)
    for held in (memory, plain):
        held.reset(pseudo, bank)
    expected = memory.features[:2].clone()
    for row, images in ((0, [1, 2]), (1, [0])):
        moved = 0.3 * expected[row] + 0.7 * feats[images].mean(0)
        expected[row] = moved / moved.norm()
    for held in (memory, plain):
        held(feats, held.rows(batch))
    torch.testing.assert_close(memory.features[:2], expected)
    assert torch.equal(memory.features[2:], plain.features[2:])
    assert not torch.allclose(memory.features[0], plain.features[0])
    memory(feats[3:], memory.rows(batch)[3:])
    torch.testing.assert_close(memory.features[:2], expected)  # no source image, no change


@pytest.mark.parametrize("keys", [{}, {"source_mean": True}])
def test_a_joint_batch_in_parts_moves_rows_and_costs_as_the_whole_one(joint, keys):
    """Parts of one source and one unlabelled image each."""
    bank, pseudo, batch, feats = joint
    whole, parts = (HybridMemory(4, momentum=0.3, **keys) for _ in range(2))
    for held in (whole, parts):
        held.reset(pseudo, bank)
    rows, loss = whole.rows(batch), UnifiedContrastLoss()
    expected = loss(whole.label_logits(whole(feats, rows)), batch.labels, batch.domains)
    costs = []
    with moved_once(parts):
        for i in range(3):
            part = [i, i + 3]
            logits = parts.label_logits(parts(feats[part], rows[part]))
            costs.append(loss(logits, batch.labels[part], batch.domains[part]))
    torch.testing.assert_close(torch.stack(costs).mean(), expected)
    assert torch.equal(parts.features, whole.features)


def test_a_gradient_that_needs_the_moved_rows_refuses_parts(joint):
    bank, pseudo, batch, feats = joint
    memory = HybridMemory(4, target_first=True)
    memory.reset(pseudo, bank)
    rows = memory.rows(batch)
    wanted = r"TARGET_FIRST is true and SOLVER\.ACCUMULATE above 1.*Set ACCUMULATE to 1"
    with moved_once(memory), pytest.raises(ValueError, match=wanted):
        memory(feats, rows)


def test_saved_rows_are_clustered_after_loading(joint):
    bank, pseudo, _, _ = joint
    memory, other = HybridMemory(4), HybridMemory(4)
    memory.reset(pseudo, bank)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.instances, bank.feats)


def plain_loss(logits, labels, domains, epsilon: float = 0.0) -> float:
    """The definition, image by image."""
    parts: dict[bool, list[float]] = {True: [], False: []}
    for row, label, domain in zip(logits.double().tolist(), labels.tolist(), domains.tolist(), strict=True):
        exps = [math.exp(value) for value in row]
        parts[domain > 0].append(-math.log(exps[label] / (sum(exps) + epsilon) + epsilon))
    return sum(sum(part) / len(part) for part in parts.values() if part)


def loss_case(dtype=torch.float64, labels: int = 7):
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(12, labels, generator=generator, dtype=torch.float64)
    domains = torch.tensor([1, 1, 2, 2, 2] + [0] * 7)
    return logits.to(dtype), torch.randint(0, labels, (12,), generator=generator), domains


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.1])
def test_loss_equals_a_plain_loop(epsilon):
    logits, labels, domains = loss_case()
    loss = UnifiedContrastLoss(epsilon=epsilon)
    for part in (slice(None), domains > 0, domains == 0):
        case = logits[part], labels[part], domains[part]
        assert loss(*case).item() == pytest.approx(plain_loss(*case, epsilon), rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.1])
def test_loss_gradient_equals_finite_differences(epsilon):
    logits, labels, domains = loss_case()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda value: UnifiedContrastLoss(epsilon=epsilon)(value, labels, domains), logits)


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_loss_does_not_depend_on_the_order_of_the_batch(epsilon):
    logits, labels, domains = loss_case()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    loss = UnifiedContrastLoss(epsilon=epsilon)
    torch.testing.assert_close(loss(logits[order], labels[order], domains[order]), loss(logits, labels, domains))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_loss_of_half_precision_is_near_that_of_double(dtype, epsilon):
    loss = UnifiedContrastLoss(epsilon=epsilon)(*loss_case(dtype))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain_loss(*loss_case(), epsilon), rel=0.02)


def test_loss_of_one_label_is_nothing():
    logits, labels, domains = loss_case(torch.float32, labels=1)
    assert UnifiedContrastLoss()(logits, labels, domains).item() == 0.0
    assert UnifiedContrastLoss(epsilon=1e-6)(logits, labels, domains).item() == pytest.approx(0.0, abs=1e-4)


def test_epsilon_lets_the_loss_saturate_and_no_similarity_overflows():
    logits = torch.tensor([[0.0, 100.0]], requires_grad=True)
    labels, domains = torch.tensor([0]), torch.tensor([0])
    UnifiedContrastLoss(epsilon=1e-6)(logits, labels, domains).backward()
    assert UnifiedContrastLoss(epsilon=1e-6)(logits, labels, domains).item() == pytest.approx(-math.log(1e-6))
    assert logits.grad.abs().max() < 1e-9
    assert UnifiedContrastLoss()(logits, labels, domains).item() == pytest.approx(100.0)


@pytest.mark.parametrize("epsilon", [-0.1, 1.0])
def test_epsilon_out_of_range(epsilon):
    with pytest.raises(ValueError, match=rf"UnifiedContrastLoss: EPSILON is {epsilon}; a number in \[0, 1\)"):
        UnifiedContrastLoss(epsilon=epsilon)
