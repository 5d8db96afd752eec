"""Images → features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.norm import rows_of_domains
from fastreid_uns.registry import BACKBONE_REGISTRY, HEAD_REGISTRY
from fastreid_uns.structures import HeadOutput


class Encoder(nn.Module):
    """Normalisation of the pixels, backbone and head.

    Mean and standard deviation belong to the config, not to the weights: they are in no `state_dict`.

    Args:
        backbone: (B,3,H,W) → what the head takes.
        head: → `HeadOutput`.
        mean: of each channel, in 0..1.
        std: of each channel, in 0..1, positive.

    Raises:
        ValueError: `mean` and `std` are not three numbers each, or a deviation is not positive.

    Example:
        >>> from fastreid_uns.modeling.backbones.small_net import SmallNet
        >>> from fastreid_uns.modeling.heads import EmbeddingHead
        >>> backbone = SmallNet((64, 32), width=8)
        >>> head = EmbeddingHead(backbone.out_channels, dim=16)
        >>> encoder = Encoder(backbone, head, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)).eval()
        >>> encoder(torch.zeros(2, 3, 64, 32, dtype=torch.uint8)).feats.shape
        torch.Size([2, 16])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, head: nn.Module, *, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise InvalidValue(
                f"INPUT.MEAN {list(mean)}, INPUT.STD {list(std)}; three numbers each are accepted, deviations above 0. "
                f"Change them."
            )
        self.backbone = backbone
        self.head = head
        self.dim: int = head.dim  # type: ignore[assignment]
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)

    def __call__(self, images: Tensor, domains: Tensor | None = None) -> HeadOutput:
        """Features of B images, which are left as they are.

        Args:
            images: (B,3,H,W) uint8, or float in 0..1.
            domains: (B,) on the CPU, which set each image comes from; read in training by domain-specific norm layers
                only. Rows of a domain stand together. None: all are of domain 0.
        """
        with rows_of_domains(self, domains):  # read by the host, so it is no part of what is compiled
            return super().__call__(images)

    def forward(self, images: Tensor) -> HeadOutput:
        """See `__call__`; all images are of domain 0."""
        if not images.is_floating_point():
            images = images.to(self.mean.dtype) / 255
        images = (images - self.mean) / self.std
        return self.head(self.backbone(images))


def build_encoder(cfg: Any) -> Encoder:
    """The encoder of a complete config on the CPU, with random weights and plain norm layers."""
    backbone = BACKBONE_REGISTRY.build(cfg.MODEL.BACKBONE, tuple(cfg.INPUT.SIZE))
    head = HEAD_REGISTRY.build(cfg.MODEL.HEAD, backbone.out_channels)
    return Encoder(backbone, head, mean=cfg.INPUT.MEAN, std=cfg.INPUT.STD)


def compile_encoders(model: nn.Module, **options: Any) -> None:
    """Let torch compile the encoders in a model when they are first used; their weights stay where they are.

    Each size of a batch is compiled for itself, and training, evaluation and each way of asking for gradients as well.

    Args:
        options: of `torch.compile`.
    """
    for module in model.modules():
        if isinstance(module, Encoder):
            module.compile(dynamic=False, **options)
