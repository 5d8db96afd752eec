"""The head of PASS in which every token has a neck of its own."""

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
class MultiNeckHead(TokenHead):
    """`TokenHead` that fuses after the necks: every token through a BNNeck of its own and to unit length.

    Args:
        in_channels: C of a token.
        fuse: mean ((c+m)/2) or cat (c and m side by side, 2C wide) of the class token c and the mean m of the parts.
        parts: part tokens of the backbone.

    Raises:
        ValueError: another fusion, or no parts; in forward, a backbone with another number of part tokens.

    Source: Zhu et al. 2022 (PASS), released code with `--multi-neck`; differs: `feats` have unit length. The released
    code clusters and ranks what is `unnormalized` here, up to the square root of 2 long; its memory normalises it.
    """

    def __init__(self, in_channels: int, *, fuse: str = "cat", parts: int = 3) -> None:
        super().__init__(in_channels, fuse=fuse)
        if fuse == "class":
            raise InvalidValue("MODEL.HEAD.FUSE: 'class' has no parts; accepted: mean, cat. Take TokenHead for none.")
        if parts < 1:
            raise InvalidValue(f"MODEL.HEAD.PARTS is {parts}; 1 or more is accepted. Take TokenHead for none.")
        self.embed = Embedding(in_channels, 0, "bnneck")
        self.part_embed = nn.ModuleList(Embedding(in_channels, 0, "bnneck") for _ in range(parts))

    def forward(self, output: Tensor | Tokens) -> HeadOutput:
        """What the backbone gives → `HeadOutput` without parts; `pooled` (B,D) are the fused tokens."""
        tokens = self.tokens_of(output)
        if tokens.shape[1] != 1 + len(self.part_embed):
            raise InvalidValue(
                f"MultiNeckHead: MODEL.HEAD.PARTS is {len(self.part_embed)} but the backbone gives "
                f"{tokens.shape[1] - 1} part tokens. Set it to MODEL.BACKBONE.PART_TOKENS."
            )
        with torch.autocast(tokens.device.type, enabled=False):
            necks = zip([self.embed, *self.part_embed], tokens.unbind(1), strict=True)
            unnormalized = self.fused(torch.stack([F.normalize(neck(token)) for neck, token in necks], dim=1))
            return HeadOutput(self.fused(tokens), F.normalize(unnormalized), unnormalized=unnormalized)
