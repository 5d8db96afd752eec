"""Training without labels that starts from good features and keeps them: instance contrast on cached activations.

Only the last two stages are trained, on what the stages before them gave once for each view; norm layers keep their
statistics. Features are compared in the whitened space of the start, in which directions that tell photos apart weigh
more than those in which views of one photo differ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_uns.modeling.losses import instance_contrast
from fastreid_uns.modeling.whitening import ViewWhitening
from fastreid_uns.photos.embed import Stages, Told
from fastreid_uns.photos.view_store import ViewStore
from fastreid_uns.utils.transfer import to_device


@dataclass(frozen=True)
class Adaptation:
    """How the last stages are trained.

    Attributes:
        steps: of the optimiser; 100 were no better than 50 on the training identities of three sets.
        batch: photos in a step, two views of each.
        rate: learning rate of Adam at the first step; it falls to 0 along half a cosine.
        temperature: similarities are divided by it.
    """

    steps: int = 50
    batch: int = 64
    rate: float = 3e-4
    temperature: float = 0.2


def adapt(
    stages: Stages,
    kept: ViewStore,
    space: ViewWhitening,
    how: Adaptation,
    unit: Tensor,
    *,
    seed: int = 0,
    told: Told = lambda done: None,
) -> list[float]:
    """Train the top of an encoder, in place, by telling each photo of a batch from those of other groups.

    Args:
        stages: the top is trained, in evaluation mode, so that its norm layers keep their statistics.
        kept: activations of all photos.
        space: what features are compared in; it stays as it is.
        unit: (N,) int64; photos with the same number are each other's positives, all others of a batch negatives.
        told: counts views that went forth and back.

    Returns:
        The loss of each step.

    Source: the loss is NT-Xent (Chen et al. 2020) between the first and the second views of a batch.
    """
    space = copy.deepcopy(space).requires_grad_(False)
    parameters = [p for p in stages.top.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=how.rate)
    generator = torch.Generator().manual_seed(seed)
    top, losses = stages.trained_top(kept.take(slice(0, 1)).flatten(0, 1)), []
    for step, photos in enumerate(_batches(len(kept), how, generator)):
        for group in optimizer.param_groups:
            group["lr"] = how.rate * (1 + math.cos(math.pi * step / how.steps)) / 2
        chosen = torch.rand(len(photos), kept.number, generator=generator).argsort(1)[:, :2]
        same = to_device(unit[photos], stages.device)
        values = kept.take(photos, chosen)
        pooled = stages.pooled(values.flatten(0, 1), top)
        feats = F.normalize(space(pooled)).unflatten(0, values.shape[:2])
        loss = instance_contrast(feats[:, 0], feats[:, -1], same, how.temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        told(feats.shape[0] * feats.shape[1])
    return losses


def _batches(count: int, how: Adaptation, generator: torch.Generator) -> Iterator[Tensor]:
    """Photos of each step: all of them in random order, again and again; never one twice in a step."""
    size = min(how.batch, count)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(how.steps):
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        yield order[:size]
        order = order[size:]
