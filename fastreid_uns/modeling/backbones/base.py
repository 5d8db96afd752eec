"""What a backbone owes to the rest of the encoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.modeling.positions import Grid, Positions, record_grid

_log = logging.getLogger(__name__)


class Tokens(NamedTuple):
    """What a transformer gives for B images: its patches as a map, and the tokens that stand for the whole image."""

    map: Tensor  # (B,C,h,w)
    tokens: Tensor  # (B,1+P,C): the class token, then P part tokens


class Backbone(nn.Module):
    """Normalised images (B,3,H,W) → feature map (B,C,h,w); a transformer with a class token gives `Tokens`.

    The framework hands over the image size as the only positional argument of the constructor. `positions` says how a
    position embedding is filled from a file; it is None where there is none.
    """

    out_channels: int
    positions: Positions | None = None
    published_grid: Grid | None = None  # of the weights of `imagenet_url`, where their library states it

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(record_grid)

    @property
    def grid(self) -> Grid | None:
        """Lines and columns of the patches of a position embedding, None where there is none."""
        return self.positions.grid if self.positions is not None else None

    @classmethod
    def pretrained_input(cls, section: Mapping[str, Any]) -> dict[str, list[float]]:
        """Keys of `INPUT` and the numbers that the weights of `imagenet_url` expect; those left out are free.

        Args:
            section: `MODEL.BACKBONE`.
        """
        return {"MEAN": [0.485, 0.456, 0.406], "STD": [0.229, 0.224, 0.225]}

    @classmethod
    def options_of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keys of `MODEL.BACKBONE` and what the shapes of a network's tensors say about them; those left out are open.

        Args:
            tensors: by the names of this class; they may be of another class and tell nothing.
        """
        return {}

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file of `imagenet_url` under the names of today's network of the same library."""
        return state

    def imagenet_url(self) -> str:
        """Where the library behind this backbone publishes its weights: a file, a URL or `hub:user/name`.

        Raises:
            RuntimeError: nobody publishes weights for it.
        """
        raise InvalidState(
            f"{type(self).__name__}: there are no published ImageNet weights for it. Set MODEL.WEIGHTS to a file, or "
            f"to '' for random initialisation."
        )

    def split(self) -> tuple[nn.Module, nn.Module]:
        """The network up to its last two stages, and these; one after the other they are `forward`.

        Both are made of the modules of this one, so what is trained in them is trained here.

        Raises:
            InvalidState: it is not known where the stages begin.
        """
        raise InvalidState(
            f"{type(self).__name__}: its last stages cannot be trained apart. Take an EfficientNet, a MobileNet or a "
            f"ResNet of timm, or train all of it."
        )

    def imagenet_package(self) -> str:
        """Name of a package that carries the same weights in itself, so that no network is needed; "" for none."""
        return ""


def feature_map(output: Tensor | Tokens) -> Tensor:
    """The map (B,C,h,w) of a backbone's output."""
    return output.map if isinstance(output, Tokens) else output


def output_shape(backbone: nn.Module, size: tuple[int, int], what: str) -> torch.Size:
    """Shape (1,C,h,w) of the map that images of `size` give; found without computing anything.

    Raises:
        ValueError: images of this size do not pass, or what comes out is no map.
    """
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    shapes = {name: value.to("meta") for name, value in state.items()}
    training = backbone.training
    try:
        output = torch.func.functional_call(backbone.eval(), shapes, torch.empty(1, 3, *size, device="meta"))
    except (RuntimeError, AssertionError) as error:
        raise InvalidValue(
            f"{what}: images of {size[0]}x{size[1]} pixels do not pass ({str(error).splitlines()[0]}). Change "
            f"INPUT.SIZE, or take another MODEL.BACKBONE."
        ) from error
    finally:
        backbone.train(training)
    found = feature_map(output).shape
    if len(found) != 4:
        raise InvalidValue(
            f"{what}: the output has shape {tuple(found)}; a map (B,C,h,w) is needed. Take a convolutional model."
        )
    return found


def set_last_stride(stages: nn.Module, stride: int, what: str) -> None:
    """Set the stride of the first block of stage 4 of a ResNet, in place: its 3x3 convolution and its shortcut.

    A model without `layer4` is left as published, and the log says so.

    Raises:
        ValueError: `stride` is neither 1 nor 2.
    """
    if stride not in (1, 2):
        raise InvalidValue(f"{what}: LAST_STRIDE is {stride}; 1 and 2 are accepted. Change it.")
    if stride == 2:
        return
    if not hasattr(stages, "layer4"):
        _log.info("%s: LAST_STRIDE 1 is defined for ResNets only; this network keeps its strides as published.", what)
        return
    block: nn.Module = stages.layer4[0]  # type: ignore[index, assignment]
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 1)
        elif isinstance(module, nn.AvgPool2d) and module.stride in (2, (2, 2)):  # shortcut of the ResNet-D family
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, nn.Identity())
