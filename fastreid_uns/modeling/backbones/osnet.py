"""OSNet, the small network of Torchreid."""

from __future__ import annotations

from torch import Tensor, nn

from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.modeling.backbones.base import Backbone
from fastreid_uns.registry import BACKBONE_REGISTRY


class _Conv(nn.Module):
    """Convolution, batch norm and, unless `linear`, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, linear: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return x if self.linear else x.relu()


class _LightConv(nn.Module):
    """A 3x3 convolution taken apart: across channels, then within each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, groups=channels)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv2(self.conv1(x))).relu()


class _Gate(nn.Module):
    """Weight of each channel, from its mean over the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // 16, 1)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class _Block(nn.Module):
    """Four streams with receptive fields of 3, 5, 7 and 9 pixels, mixed by one gate (Zhou et al. 2019, figure 4)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        middle = outputs // 4
        self.conv1 = _Conv(inputs, middle)
        self.conv2a = _LightConv(middle)
        self.conv2b = nn.Sequential(*(_LightConv(middle) for _ in range(2)))
        self.conv2c = nn.Sequential(*(_LightConv(middle) for _ in range(3)))
        self.conv2d = nn.Sequential(*(_LightConv(middle) for _ in range(4)))
        self.gate = _Gate(middle)
        self.conv3 = _Conv(middle, outputs, linear=True)
        self.downsample = nn.Identity() if inputs == outputs else _Conv(inputs, outputs, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.conv1(x)
        streams = (self.conv2a, self.conv2b, self.conv2c, self.conv2d)
        return (self.conv3(sum(self.gate(stream(reduced)) for stream in streams)) + self.downsample(x)).relu()


def _stage(inputs: int, outputs: int, *, shrink: bool) -> nn.Sequential:
    layers: list[nn.Module] = [_Block(inputs, outputs), _Block(outputs, outputs)]
    if shrink:
        layers.append(nn.Sequential(_Conv(outputs, outputs), nn.AvgPool2d(2, stride=2)))
    return nn.Sequential(*layers)


@BACKBONE_REGISTRY.register()
class OSNet(Backbone):
    """Omni-scale network: 1.9 million parameters at width 1; weight names are those of Torchreid.

    Args:
        size: height and width of the images; any size will do.
        width: factor on the channels: 1.0, 0.75, 0.5 and 0.25 have published weights.

    Raises:
        ValueError: `width` leaves a stage without channels.

    Source: Zhou et al. 2019 (Omni-Scale Feature Learning), table 1; differs: the last linear layer is left to the head.
    """

    def __init__(self, size: tuple[int, int], *, width: float = 1.0) -> None:
        super().__init__()
        channels = [int(width * full) for full in (64, 256, 384, 512)]
        if channels[1] < 64:
            raise InvalidValue(f"OSNet: WIDTH is {width}; at least 0.25 is accepted. Raise MODEL.BACKBONE.WIDTH.")
        self.conv1 = _Conv(3, channels[0], kernel=7, stride=2)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv2 = _stage(channels[0], channels[1], shrink=True)
        self.conv3 = _stage(channels[1], channels[2], shrink=True)
        self.conv4 = _stage(channels[2], channels[3], shrink=False)
        self.conv5 = _Conv(channels[3], channels[3])
        self.out_channels = channels[3]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) → (B,C,H/16,W/16)."""
        return self.conv5(self.conv4(self.conv3(self.conv2(self.maxpool(self.conv1(images))))))

    def imagenet_url(self) -> str:
        """Torchreid keeps its weights behind a page, not behind a link.

        Raises:
            RuntimeError: always.
        """
        raise InvalidState(
            "OSNet: its ImageNet weights have no direct link. Download them from the model zoo of Torchreid "
            "(kaiyangzhou.github.io/deep-person-reid/MODEL_ZOO) and set MODEL.WEIGHTS to the file."
        )
