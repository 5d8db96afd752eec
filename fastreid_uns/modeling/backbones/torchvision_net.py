"""Convolutional networks of torchvision."""

from __future__ import annotations

from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue, UnknownName
from fastreid_uns.modeling.backbones.base import Backbone, output_shape, set_last_stride
from fastreid_uns.registry import BACKBONE_REGISTRY, did_you_mean

_AFTER_THE_MAP = {"avgpool", "classifier", "fc", "head"}


@BACKBONE_REGISTRY.register(name="torchvision")
class TorchvisionBackbone(Backbone):
    """A classification network of torchvision up to its last feature map; weight names are those of torchvision.

    Args:
        size: height and width of the images, in pixels.
        model: name in torchvision.models, for example resnet50.
        last_stride: of stage 4 of a ResNet: 1 (re-identification) or 2 (as published); others stay as published.
        stem_relu: keep the ReLU after the first convolution of a ResNet (CAP trains without it).

    Raises:
        KeyError: unknown model.
        ValueError: no convolutional network, or an option that the model does not have.
    """

    def __init__(
        self, size: tuple[int, int], *, model: str = "resnet50", last_stride: int = 1, stem_relu: bool = True
    ) -> None:
        super().__init__()
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
        if model not in known:
            raise UnknownName(
                f"torchvision: unknown model {model!r}{did_you_mean(model, known)} "
                f"torchvision.models.list_models() lists all."
            )
        net = torchvision.models.get_model(model, weights=None)
        what = f"torchvision {model}"
        set_last_stride(net, last_stride, what)
        for name, child in net.named_children():
            if name in _AFTER_THE_MAP:
                break
            self.add_module(name, child)
        if model.startswith("densenet"):  # torchvision applies this one outside of its modules
            self.add_module("relu", nn.ReLU(inplace=True))
        if not stem_relu:
            if not hasattr(self, "layer4"):
                raise InvalidValue(f"{what}: STEM_RELU is an option of ResNets only. Remove it.")
            del self.relu
        self.model = model
        self.out_channels = output_shape(self, size, what)[1]

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) → (B,C,h,w)."""
        for stage in self.children():
            images = stage(images)
        return images

    def imagenet_url(self) -> str:
        """URL of torchvision's first published weights, which are those that the papers started from."""
        import torchvision

        return next(iter(torchvision.models.get_model_weights(self.model))).url
