"""The head of PCL-CLIP: the class token and its projection side by side, with a neck each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.backbones.base import Tokens
from fastreid_uns.modeling.heads import Embedding, TokenHead
from fastreid_uns.registry import HEAD_REGISTRY
from fastreid_uns.structures import HeadOutput


@HEAD_REGISTRY.register()
class ClipHead(TokenHead):
    """Class token a and its projection aW, each through a BNNeck of its own, side by side, then one unit length.

    W is CLIP's projection into the space of texts; it has no bias and is trained on.

    Args:
        in_channels: C of a token.
        dim: P of the projection; 512 for CLIP's ViT-B/16.

    Raises:
        ValueError: `dim` is not positive; in forward, a backbone without a class token.

    Source: Li and Gong 2023 (PCL-CLIP), released code.
    """

    def __init__(self, in_channels: int, *, dim: int = 512) -> None:
        if dim < 1:
            raise InvalidValue(f"MODEL.HEAD.DIM is {dim}; 1 or more is accepted (512 for CLIP). TokenHead has none.")
        super().__init__(in_channels)
        self.projected = Embedding(in_channels, dim, "bnneck", bias=False)
        nn.init.normal_(self.projected.project.weight, std=in_channels**-0.5)  # type: ignore[arg-type]
        self.dim = in_channels + dim

    def forward(self, output: Tensor | Tokens) -> HeadOutput:
        """What the backbone gives → `HeadOutput` without parts; `pooled` (B,C) is the class token, D is C+P."""
        tokens = self.tokens_of(output)
        with torch.autocast(tokens.device.type, enabled=False):
            pooled = self.fused(tokens)
            unnormalized = torch.cat([self.embed(pooled), self.projected(pooled)], dim=1)
            return HeadOutput(pooled, F.normalize(unnormalized), unnormalized=unnormalized)
