"""Several networks of timm as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.backbones.base import Backbone, feature_map
from fastreid_uns.modeling.backbones.timm_net import TimmBackbone
from fastreid_uns.registry import BACKBONE_REGISTRY


@BACKBONE_REGISTRY.register(name="ensemble")
class EnsembleBackbone(Backbone):
    """Networks of timm beside each other, whose maps are joined along the channels.

    Args:
        size: height and width of the images, in pixels.
        models: names as in `TimmBackbone`; their maps must have the same height and width at this size.

    Raises:
        InvalidValue: no network, or maps of different sizes; else as `TimmBackbone`.
    """

    def __init__(self, size: tuple[int, int], *, models: Sequence[str]) -> None:
        super().__init__()
        if not models:
            raise InvalidValue("MODEL.BACKBONE.MODELS: it names no network. Name one or more networks of timm.")
        nets = [TimmBackbone(size, model=model) for model in models]
        self.members = nn.ModuleList(nets)
        maps = {model: net.map_size for model, net in zip(models, nets, strict=True)}
        if len(set(maps.values())) > 1:
            raise InvalidValue(
                f"MODEL.BACKBONE.MODELS: maps of one size are needed, and images of {size[0]}x{size[1]} pixels give "
                f"{', '.join(f'{h}x{w} ({model})' for model, (h, w) in maps.items())}. Take other networks."
            )
        self.out_channels = sum(net.out_channels for net in nets)

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) → (B,C,h,w), C of all networks together."""
        return _joined(self.members, [images] * len(self.members))

    def split(self) -> tuple[nn.Module, nn.Module]:
        """The first stages of all networks, and the last two of each on its share of the channels.

        Raises:
            InvalidState: it is not known where the stages of a network begin.
        """
        trunks, tops = zip(*(net.split() for net in self.members), strict=True)  # type: ignore[operator]
        return _Trunks(trunks), _Tops(tops, [_inputs(top) for top in tops])

    @classmethod
    def pretrained_input(cls, section: Mapping[str, Any]) -> dict[str, list[float]]:
        """What timm states for the first network; the others must have the same mean and standard deviation.

        Raises:
            InvalidValue: they do not.
        """
        first, *others = [TimmBackbone.pretrained_input({"MODEL": model}) for model in section["MODELS"]]
        for model, other in zip(section["MODELS"][1:], others, strict=True):
            if any(other.get(key) != first.get(key) for key in ("MEAN", "STD")):
                raise InvalidValue(
                    f"MODEL.BACKBONE.MODELS: {model} was trained with another mean or standard deviation of the "
                    f"images than {section['MODELS'][0]}. Take networks that agree."
                )
        return first


class _Trunks(nn.ModuleList):
    """The same images through several networks."""

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) → (B,C,h,w)."""
        return _joined(self, [images] * len(self))


class _Tops(nn.ModuleList):
    """To each network its channels.

    Args:
        tops: the networks.
        channels: how many each of them takes.
    """

    def __init__(self, tops: Sequence[nn.Module], channels: Sequence[int]) -> None:
        super().__init__(tops)
        self.channels = list(channels)

    def forward(self, maps: Tensor) -> Tensor:
        """(B,C,h,w) → (B,D,h',w')."""
        return _joined(
            self, [part.contiguous(memory_format=torch.channels_last) for part in maps.split(self.channels, 1)]
        )


def _joined(networks: nn.ModuleList, inputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([feature_map(net(one)) for net, one in zip(networks, inputs, strict=True)], dim=1)


def _inputs(top: nn.Module) -> int:
    """Channels that its first convolution takes."""
    return next(part.in_channels for part in top.modules() if isinstance(part, nn.Conv2d))
