"""What every registered memory must do."""

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns import builtin  # noqa: F401
from fastreid_uns.registry import MEMORY_REGISTRY
from fastreid_uns.structures import FeatureBank, PseudoLabels

NAMES = [name for name, _ in MEMORY_REGISTRY]


def filled(name: str, images: int = 8):
    memory = MEMORY_REGISTRY.get(name)(6)
    feats = F.normalize(torch.randn(images, 6, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(images) // 2
    centroids = F.normalize(feats.view(-1, 2, 6).mean(1))
    memory.reset(PseudoLabels(labels, centroids), FeatureBank(feats, torch.zeros(images)))
    return (
        memory,
        F.normalize(torch.randn(4, 6, generator=torch.Generator().manual_seed(1))),
        torch.tensor([0, 1, 0, 2]),
    )


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_similarities_over_temperature_before_the_update(name):
    memory, feats, labels = filled(name)
    expected = torch.stack([torch.stack([f @ row for row in memory.features]) for f in feats]) / memory.temperature
    torch.testing.assert_close(memory(feats, labels), expected)


@pytest.mark.parametrize("name", [name for name in NAMES if MEMORY_REGISTRY.get(name).moves])
def test_training_moves_the_rows_of_the_batch_and_keeps_unit_length(name):
    memory, feats, labels = filled(name)
    before = memory.features
    memory(feats, labels)
    changed = (memory.features != before).any(1)
    assert changed.nonzero().flatten().tolist() == [0, 1, 2]
    torch.testing.assert_close(memory.features.norm(dim=1), torch.ones(len(before)))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_changes_nothing(name):
    memory, feats, labels = filled(name)
    before = memory.features.clone()
    memory.eval()(feats, labels)
    assert torch.equal(memory.features, before)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_features_and_never_the_rows(name):
    memory, feats, labels = filled(name)
    feats.requires_grad_()
    memory(feats, labels).sum().backward()
    assert feats.grad.abs().sum() > 0
    assert not memory.features.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_state_of_another_row_count_loads(name):
    memory, _, _ = filled(name, images=8)
    other, _, _ = filled(name, images=4)
    other.load_state_dict(memory.state_dict())
    assert torch.equal(other.features, memory.features)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_give_float32_logits(name, dtype):
    memory, feats, labels = filled(name)
    logits = memory(feats.to(dtype), labels)
    assert logits.dtype == torch.float32
    assert memory.features.dtype == torch.float32
