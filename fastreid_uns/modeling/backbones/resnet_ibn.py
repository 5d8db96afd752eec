"""ResNets that mix instance and batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.backbones.base import Backbone, set_last_stride
from fastreid_uns.registry import BACKBONE_REGISTRY

_DEPTHS = (18, 34, 50, 101, 152)
_RELEASE = "https://github.com/XingangPan/IBN-Net/releases/download/v1.0"
_HASHES = {
    ("a", 18): "2f571257",
    ("a", 34): "94bc1577",
    ("a", 50): "d9d0bb7b",
    ("a", 101): "59ea0ac6",
    ("b", 18): "bc2f3c11",
    ("b", 34): "04134c37",
    ("b", 50): "9ca61e85",
    ("b", 101): "c55f6dba",
}


class IBN(nn.Module):
    """Instance normalisation of the first half of the channels, batch normalisation of the rest."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.sizes = [channels // 2, channels - channels // 2]
        self.IN = nn.InstanceNorm2d(self.sizes[0], affine=True)
        self.BN = nn.BatchNorm2d(self.sizes[1])

    def forward(self, x: Tensor) -> Tensor:
        first, rest = x.split(self.sizes, dim=1)
        return torch.cat([self.IN(first), self.BN(rest)], dim=1)


class _NormAfterSum(nn.Module):
    """A residual block whose sum is instance-normalised; the layers are those of a torchvision block."""

    conv1: nn.Module
    bn1: nn.Module
    conv2: nn.Module
    bn2: nn.Module
    conv3: nn.Module
    bn3: nn.Module
    relu: nn.Module

    def __init__(self, block: nn.Module, channels: int) -> None:
        super().__init__()
        self.downsample: nn.Module | None = None
        for name, child in block.named_children():
            setattr(self, name, child)
        self.IN = nn.InstanceNorm2d(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, "conv3"):
            out = self.bn3(self.conv3(self.relu(out)))
        return self.relu(self.IN(out + (x if self.downsample is None else self.downsample(x))))


@BACKBONE_REGISTRY.register()
class ResNetIBN(Backbone):
    """IBN-Net: a ResNet whose early stages also use instance normalisation; weight names are those of IBN-Net.

    Variant `a` instance-normalises half of the channels after the first convolution of each block of stages 1 to 3;
    variant `b` all channels of the stem and of the last sum of stages 1 and 2.

    Args:
        size: height and width of the images; any size will do.
        depth: 18, 34, 50, 101 or 152.
        ibn: a or b.
        last_stride: of stage 4: 1 (re-identification) or 2 (as published).

    Raises:
        ValueError: a value out of range.

    Source: Pan et al. 2018 (IBN-Net), figure 3.
    """

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential

    def __init__(self, size: tuple[int, int], *, depth: int = 50, ibn: str = "a", last_stride: int = 1) -> None:
        super().__init__()
        if depth not in _DEPTHS or ibn not in ("a", "b"):
            raise InvalidValue(
                f"ResNetIBN: DEPTH {depth}, IBN {ibn!r}; accepted are depths {', '.join(map(str, _DEPTHS))} and the "
                f"variants a and b. Change MODEL.BACKBONE."
            )
        import torchvision

        net = torchvision.models.get_model(f"resnet{depth}", weights=None)
        set_last_stride(net, last_stride, "ResNetIBN")
        self.out_channels = net.fc.in_features
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(net, name))
        if ibn == "a":
            for block in (*self.layer1, *self.layer2, *self.layer3):
                block.bn1 = IBN(block.bn1.num_features)
        else:
            self.bn1 = nn.InstanceNorm2d(64, affine=True)
            for i, stage in enumerate((self.layer1, self.layer2)):
                stage[-1] = _NormAfterSum(stage[-1], (64 << i) * self.out_channels // 512)
        self.depth, self.ibn = depth, ibn

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) → (B,C,H/16,W/16) with `last_stride` 1, else H/32 and W/32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def imagenet_url(self) -> str:
        """URL of the weights that the authors of IBN-Net publish; there are none for depth 152."""
        if (self.ibn, self.depth) not in _HASHES:
            return super().imagenet_url()
        return f"{_RELEASE}/resnet{self.depth}_ibn_{self.ibn}-{_HASHES[self.ibn, self.depth]}.pth"
