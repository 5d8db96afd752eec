"""A small residual network for demonstrations, tests and machines without an accelerator."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.backbones.base import Backbone
from fastreid_uns.registry import BACKBONE_REGISTRY


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class _Block(nn.Module):
    """relu(shortcut + two 3x3 convolutions)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv_norm(inputs, outputs, 3, stride), nn.ReLU(inplace=True), _conv_norm(outputs, outputs, 3, 1)
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.branch(x) + self.shortcut(x))


@BACKBONE_REGISTRY.register()
class SmallNet(Backbone):
    """A residual network of four stages with 1, 2, 4 and 8 times `width` channels, at 1/2 to 1/16 of the resolution.

    At width 32 and depth 1 it has 1.2 million parameters; a 64x64 image takes 63 million multiply-adds.

    Args:
        size: height and width of the images; any size will do.
        width: channels of the first stage.
        depth: residual blocks in each stage.
        last_stride: 1 keeps the last map at 1/8 of the resolution, as the ResNets of re-identification do.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(self, size: tuple[int, int], *, width: int = 32, depth: int = 1, last_stride: int = 2) -> None:
        super().__init__()
        if width < 1 or depth < 1 or last_stride not in (1, 2):
            raise InvalidValue(
                f"SmallNet: WIDTH {width}, DEPTH {depth}, LAST_STRIDE {last_stride}; the first two must be positive, "
                f"the last 1 or 2. Change MODEL.BACKBONE."
            )
        self.stem = nn.Sequential(_conv_norm(3, width, 3, 2), nn.ReLU(inplace=True))
        channels = width
        stages: OrderedDict[str, nn.Module] = OrderedDict()
        for i, (factor, stride) in enumerate(((1, 1), (2, 2), (4, 2), (8, last_stride)), start=1):
            blocks = [_Block(channels, width * factor, stride)]
            blocks += [_Block(width * factor, width * factor, 1) for _ in range(depth - 1)]
            stages[f"stage{i}"] = nn.Sequential(*blocks)
            channels = width * factor
        self.stages = nn.Sequential(stages)
        self.out_channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) → (B,8*width,H/16,W/16), rounded up; 1/8 with `last_stride` 1."""
        return self.stages(self.stem(images))
