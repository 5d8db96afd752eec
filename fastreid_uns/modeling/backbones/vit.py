"""Vision transformers with the options of the re-identification papers."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.backbones.base import Backbone, Tokens
from fastreid_uns.modeling.backbones.resnet_ibn import IBN
from fastreid_uns.modeling.positions import Positions
from fastreid_uns.registry import BACKBONE_REGISTRY

ACTIVATIONS = ("gelu", "quick_gelu")
_PUBLISHED = {(192, 12, 3): "vit_tiny_patch16_224", (384, 12, 6): "vit_small_patch16_224"}
_PUBLISHED[768, 12, 12] = "vit_base_patch16_224"


def _conv_stem(channels: int) -> nn.Sequential:
    """Three convolutions at half resolution, the first two with IBN (TransReID-SSL, 2021, section 3.3)."""
    layers: list[nn.Module] = []
    for i, (inputs, kernel, stride) in enumerate(((3, 7, 2), (channels, 3, 1), (channels, 3, 1))):
        layers += [
            nn.Conv2d(inputs, channels, kernel, stride, padding=kernel // 2, bias=False),
            IBN(channels) if i < 2 else nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers)


@BACKBONE_REGISTRY.register()
class ViT(Backbone):
    """A vision transformer for images of one size that need not be square; blocks and weight names are timm's.

    Args:
        size: height and width of the images; pixels beyond the last whole patch are not seen.
        width: channels of a token; 192 (tiny), 384 (small) and 768 (base) are usual.
        depth: blocks.
        heads: attention heads; they divide `width`.
        patch: side of a patch, in pixels.
        stride: step between patches; smaller than `patch`, they overlap (TransReID).
        drop_path: probability of skipping the last block in training; it rises linearly from 0 at the first.
        conv_stem: put convolutions before the patches, as TransReID-SSL pre-trains; `stride` equals `patch`.
        part_tokens: tokens beside the class token; PASS has 3.
        pre_norm: a layer norm before the first block as well (CLIP).
        activation: gelu, or quick_gelu, x sigmoid(1.702 x), with which OpenAI trained CLIP.
        norm_eps: of the layer norms; 1e-6 for DINO and timm, 1e-5 for CLIP.
        patch_bias: the projection of the patches has a bias; CLIP's has none.
        pretrained_grid: lines and columns of patches of the position embedding in `MODEL.WEIGHTS`; () = found out.
        position_resize: how it comes to the grid of `size`: bicubic (DINO), bilinear (TransReID, PASS, PCL-CLIP) or
            antialiased (timm).

    Raises:
        ValueError: options that contradict each other or the image size.

    Source: He et al. 2021 (TransReID); Luo et al. 2021 (TransReID-SSL); Zhu et al. 2022 (PASS); Radford et al. 2021
    (CLIP), whose image encoder it is with `pre_norm`, `quick_gelu`, 1e-5 and no `patch_bias`.
    """

    positions: Positions

    def __init__(
        self,
        size: tuple[int, int],
        *,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        patch: int = 16,
        stride: int = 16,
        drop_path: float = 0.0,
        conv_stem: bool = False,
        part_tokens: int = 0,
        pre_norm: bool = False,
        activation: str = "gelu",
        norm_eps: float = 1e-6,
        patch_bias: bool = True,
        pretrained_grid: Sequence[int] = (),
        position_resize: str = "bicubic",
    ) -> None:
        super().__init__()
        from timm.layers import get_act_layer
        from timm.models.vision_transformer import Block

        self.size = (int(size[0]), int(size[1]))
        self.options = (width, depth, heads)
        self.plain = patch == 16 and not conv_stem and not pre_norm
        self._check(heads, patch, stride, conv_stem)
        if activation not in ACTIVATIONS:
            raise InvalidValue(f"ViT: ACTIVATION {activation!r} is unknown; accepted: {', '.join(ACTIVATIONS)}.")
        self.out_channels = width
        grid = ((self.size[0] - patch) // stride + 1, (self.size[1] - patch) // stride + 1)
        self.positions = Positions(grid, pretrained_grid, position_resize)
        if conv_stem:
            proj = nn.Conv2d(64, width, patch // 2, patch // 2, bias=patch_bias)
            self.patch_embed = nn.Sequential(OrderedDict(conv=_conv_stem(64), proj=proj))
        else:
            self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, width, patch, stride, bias=patch_bias)))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], width))
        if part_tokens:
            self.part_tokens = nn.Parameter(torch.zeros(1, part_tokens, width))
            self.part_pos = nn.Parameter(torch.zeros(1, part_tokens, width))
        rates = torch.linspace(0, drop_path, depth).tolist()
        norm: Any = partial(nn.LayerNorm, eps=norm_eps)
        self.norm_pre: nn.Module = norm(width) if pre_norm else nn.Identity()
        kinds: Any = {"norm_layer": norm, "act_layer": get_act_layer(activation)}
        self.blocks = nn.Sequential(
            *(Block(width, heads, mlp_ratio=4.0, qkv_bias=True, drop_path=rate, **kinds) for rate in rates)
        )
        self.norm = norm(width)
        for name, parameter in self.named_parameters():
            if not name.startswith("patch_embed") and parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            elif name.startswith("blocks") and name.endswith("bias"):
                nn.init.zeros_(parameter)

    def _check(self, heads: int, patch: int, stride: int, conv_stem: bool) -> None:
        width = self.options[0]
        if width % heads:
            raise InvalidValue(f"ViT: WIDTH {width} is no multiple of HEADS {heads}. Change one of them.")
        if not 1 <= stride <= patch or patch % 2:
            raise InvalidValue(f"ViT: PATCH {patch}, STRIDE {stride}; 1 <= STRIDE <= PATCH, PATCH even. Change them.")
        if conv_stem and stride != patch:
            raise InvalidValue(
                f"ViT: STRIDE {stride} with CONV_STEM; patches after the convolutions do not overlap. Set STRIDE to "
                f"PATCH ({patch}) or CONV_STEM to false."
            )
        if min(self.size) < patch:
            raise InvalidValue(
                f"ViT: images of {self.size[0]}x{self.size[1]} pixels are smaller than PATCH {patch}. Raise "
                f"INPUT.SIZE or lower MODEL.BACKBONE.PATCH."
            )
        if conv_stem and any(side % patch for side in self.size):
            near = " x ".join(str(max(1, round(side / patch)) * patch) for side in self.size)
            raise InvalidValue(
                f"ViT: images of {self.size[0]}x{self.size[1]} pixels with CONV_STEM, which leaves no room for a part "
                f"of a patch; multiples of PATCH ({patch}) are accepted. Set INPUT.SIZE to such as {near}."
            )

    def forward(self, images: Tensor) -> Tokens:
        """(B,3,H,W) → map (B,C,h,w), tokens (B,1+P,C); h and w count the patches.

        Raises:
            ValueError: the images have another size than the model was built for.
        """
        if tuple(images.shape[2:]) != self.size:
            raise InvalidValue(
                f"ViT: the images have {images.shape[2]}x{images.shape[3]} pixels, the model was built for "
                f"{self.size[0]}x{self.size[1]}. Resize the images, or set INPUT.SIZE to theirs and load the weights."
            )
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        special = self.cls_token + self.pos_embed[:, :1]
        if hasattr(self, "part_tokens"):
            special = torch.cat([special, self.part_tokens + self.part_pos], dim=1)
        x = torch.cat([special.expand(images.shape[0], -1, -1), patches + self.pos_embed[:, 1:]], dim=1)
        x = self.norm(self.blocks(self.norm_pre(x)))
        count = special.shape[1]
        return Tokens(x[:, count:].transpose(1, 2).unflatten(2, self.positions.grid), x[:, :count])

    @classmethod
    def pretrained_input(cls, section: Mapping[str, Any]) -> dict[str, list[float]]:
        """Mean and standard deviation 0.5, which timm's weights of this kind were made with; CLIP has its own."""
        if section.get("PRE_NORM"):
            return {"MEAN": [0.4815, 0.4578, 0.4082], "STD": [0.2686, 0.2613, 0.2758]}
        return {"MEAN": [0.5] * 3, "STD": [0.5] * 3}

    @classmethod
    def options_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """All but the heads and the stride, which no shape tells."""
        patches, norm = tensors.get("patch_embed.proj.weight"), tensors.get("norm.weight")
        if patches is None or norm is None or patches.dim() != 4:
            return {}
        stem = "patch_embed.conv.0.weight" in tensors
        blocks = {int(found[1]) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))}
        parts = tensors.get("part_tokens")
        return {
            "WIDTH": len(norm),
            "DEPTH": len(blocks),
            "PATCH": patches.shape[2] * (2 if stem else 1),
            "CONV_STEM": stem,
            "PART_TOKENS": 0 if parts is None else parts.shape[1],
            "PRE_NORM": "norm_pre.weight" in tensors,
            "PATCH_BIAS": "patch_embed.proj.bias" in tensors,
        }

    def imagenet_url(self) -> str:
        """timm's ImageNet weights of the same width, depth and heads."""
        if not self.plain or self.options not in _PUBLISHED:
            return super().imagenet_url()
        return f"hub:timm/{_PUBLISHED[self.options]}.augreg_in21k_ft_in1k"
