"""A batch in parts is the whole batch: its loss, its gradient, its move of the memory."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_uns.config import load_config
from fastreid_uns.engine.trainer import Trainer
from fastreid_uns.modeling.memory import ClusterMemory, InstanceMemory, moved_once
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels
from fastreid_uns.utils import comm

IMAGES, CLUSTERS = 16, 4


def without_batch_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(module, name, nn.Identity())
        else:
            without_batch_norm(child)
    return module


def trainer(tiny: list[str], parts: int, *overrides: str) -> Trainer:
    """A float64 model of the core whose parameters have a gradient and do not move."""
    torch.manual_seed(0)
    model = without_batch_norm(build_model(load_config(overrides=[*tiny, *overrides]), IMAGES)).double()
    generator = torch.Generator().manual_seed(1)
    feats = F.normalize(torch.randn(IMAGES, model.encoder.dim, generator=generator))
    labels = torch.arange(IMAGES) % CLUSTERS
    centroids = F.normalize(feats.view(-1, CLUSTERS, feats.shape[1]).sum(0))
    model.memory.reset(PseudoLabels(labels, centroids), FeatureBank(feats, torch.zeros(IMAGES)))
    model.memory.features = model.memory.features.double()
    return Trainer(model, None, KeptGradients(model.parameters()), epochs=1, iters_per_epoch=1, accumulate=parts)


class KeptGradients(torch.optim.SGD):
    """Notes the gradients of a step instead of taking it."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, lr=0.0)

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"] if p.grad is not None]


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(IMAGES, 3, 32, 16, generator=generator, dtype=torch.float64)
    index = torch.randperm(IMAGES, generator=generator)
    none = torch.zeros(IMAGES, dtype=torch.int64)
    return Batch((images,), index, index % CLUSTERS, none, none)


@pytest.mark.parametrize("memory", ["ClusterMemory", "ClusterMemory, HARD: true", "InstanceMemory"])
def test_gradient_loss_and_memory_are_those_of_the_whole_batch(tiny, batch, memory):
    change = f"MODEL.MEMORY={{NAME: {memory}, TEMPERATURE: 0.1, MOMENTUM: 0.4}}"
    whole, parts = trainer(tiny, 1, change), trainer(tiny, 4, change)
    for each in (whole, parts):
        each.model.train()
        each.step(batch)
    assert len(whole.optimizer.seen) == len(parts.optimizer.seen) > 10
    for one, other in zip(whole.optimizer.seen, parts.optimizer.seen, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-13)
    assert whole.last.keys() == parts.last.keys()
    for name, value in whole.last.items():
        torch.testing.assert_close(parts.last[name].double(), value.double(), rtol=1e-7, atol=1e-7, msg=name)
    torch.testing.assert_close(parts.model.memory.features, whole.model.memory.features, rtol=0, atol=1e-12)
    assert max(p.abs().max() for p in whole.optimizer.seen) > 1e-3


@pytest.mark.parametrize("kind", [ClusterMemory, InstanceMemory])
def test_parts_see_the_rows_of_before_and_move_them_once_bit_for_bit(kind, monkeypatch):
    gathered = []
    monkeypatch.setattr(comm, "all_gather", lambda value, equal=False: gathered.append(len(value)) or value)
    generator = torch.Generator().manual_seed(0)
    rows, feats = (F.normalize(torch.randn(n, 8, generator=generator)) for n in (5, 12))
    labels = torch.arange(12) % 5
    whole, parts = kind(8), kind(8)
    whole.features = parts.features = rows
    logits = whole(feats, labels)
    with moved_once(nn.ModuleList([parts])):
        pieces = []
        for place in range(0, 12, 4):
            pieces.append(parts(feats[place : place + 4], labels[place : place + 4]))
            assert parts.features is rows
    assert gathered == [12, 12, 12, 12]  # features and rows, once for each of the two memories
    torch.testing.assert_close(torch.cat(pieces), logits)
    assert torch.equal(parts.features, whole.features)


def test_an_error_in_a_part_leaves_the_rows_and_the_next_step_starts_anew():
    memory = ClusterMemory(2)
    memory.features = torch.eye(2)
    feats, labels = torch.tensor([[0.6, 0.8]]), torch.tensor([0])
    with contextlib.suppress(KeyboardInterrupt), moved_once(memory):
        memory(feats, labels)
        raise KeyboardInterrupt
    assert torch.equal(memory.features, torch.eye(2))
    memory(feats, labels)
    assert not torch.equal(memory.features, torch.eye(2))
