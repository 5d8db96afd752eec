"""A model, a clustering and a batch that are small enough for the tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fastreid_uns.modeling.backbones.small_net import SmallNet
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.heads import EmbeddingHead
from fastreid_uns.modeling.losses import LossSet
from fastreid_uns.modeling.norm import frozen_statistics
from fastreid_uns.projects.ACFL.memory import ReplacedMemory
from fastreid_uns.projects.ACFL.model import ACFL
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels

LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, -1])
INDEX = torch.tensor([0, 1, 3, 4, 6, 8, 2, 5])  # clusters 0, 0, 1, 1, 2, 2, 0, 1
CAMERAS = torch.arange(10) % 3
SIZE = (16, 8)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
TAU = 0.1


def build(kind: type[ACFL] = ACFL, **keys) -> ACFL:
    """A model in training, with three clusters in its memory."""
    torch.manual_seed(0)
    encoder = Encoder(SmallNet(SIZE, width=4), EmbeddingHead(32, dim=8), mean=MEAN, std=STD)
    model = kind(encoder, ReplacedMemory(8, temperature=TAU), LossSet({}), len(LABELS), **keys)
    feats = F.normalize(torch.randn(len(LABELS), 8, generator=torch.Generator().manual_seed(1)))
    pseudo = PseudoLabels(LABELS, torch.zeros(3, 8))
    model.update_memory(pseudo, FeatureBank(feats, CAMERAS))
    return model.train()


def batch(index: torch.Tensor = INDEX, size: tuple[int, int] = SIZE) -> Batch:
    """A training batch of random images."""
    images = torch.rand(len(index), 3, *size, generator=torch.Generator().manual_seed(2))
    return Batch((images,), index, LABELS[index], CAMERAS[index], torch.zeros_like(index))


def features(model: ACFL, images: torch.Tensor, encoder: Encoder | None = None) -> torch.Tensor:
    """Unit features by the statistics of the batch, which leave nothing behind."""
    encoder = encoder or model.encoder
    with torch.no_grad(), frozen_statistics(encoder):
        return encoder(images).feats
