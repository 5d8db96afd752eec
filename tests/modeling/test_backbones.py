"""Backbones against the networks that they wrap, and against their papers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastreid_uns.modeling.backbones.base import Backbone, Tokens, feature_map, output_shape, set_last_stride
from fastreid_uns.modeling.backbones.osnet import OSNet
from fastreid_uns.modeling.backbones.resnet_ibn import IBN, ResNetIBN
from fastreid_uns.modeling.backbones.small_net import SmallNet
from fastreid_uns.modeling.backbones.timm_net import TimmBackbone
from fastreid_uns.modeling.backbones.torchvision_net import TorchvisionBackbone
from fastreid_uns.modeling.backbones.vit import ViT
from fastreid_uns.registry import BACKBONE_REGISTRY

SIZE = (32, 16)


def build(name: str, size: tuple[int, int] = SIZE, **keys) -> Backbone:
    return BACKBONE_REGISTRY.build({"NAME": name, **keys}, size)


@pytest.mark.parametrize(
    ("section", "size", "shape"),
    [
        ({"NAME": "torchvision", "MODEL": "resnet18"}, (64, 32), (512, 4, 2)),
        ({"NAME": "torchvision", "MODEL": "resnet18", "LAST_STRIDE": 2}, (64, 32), (512, 2, 1)),
        ({"NAME": "torchvision", "MODEL": "mobilenet_v3_small", "LAST_STRIDE": 2}, (64, 32), (576, 2, 1)),
        ({"NAME": "timm", "MODEL": "resnet10t"}, (64, 32), (512, 4, 2)),
        ({"NAME": "timm", "MODEL": "test_vit", "LAST_STRIDE": 2}, (64, 32), (64, 4, 2)),
        ({"NAME": "timm", "MODEL": "swin_tiny_patch4_window7_224", "LAST_STRIDE": 2}, (64, 32), (768, 2, 1)),
        ({"NAME": "ResNetIBN", "DEPTH": 18}, (64, 32), (512, 4, 2)),
        ({"NAME": "ResNetIBN", "DEPTH": 18, "IBN": "b", "LAST_STRIDE": 2}, (65, 33), (512, 3, 2)),
        ({"NAME": "SmallNet", "WIDTH": 4}, (64, 32), (32, 4, 2)),
        ({"NAME": "SmallNet", "WIDTH": 4, "DEPTH": 2, "LAST_STRIDE": 1}, (50, 23), (32, 7, 3)),
        ({"NAME": "OSNet", "WIDTH": 0.25}, (64, 32), (128, 4, 2)),
        ({"NAME": "ViT", "WIDTH": 48, "HEADS": 3, "DEPTH": 1}, (64, 32), (48, 4, 2)),
        ({"NAME": "ViT", "WIDTH": 48, "HEADS": 3, "DEPTH": 1, "STRIDE": 12}, (256, 128), (48, 21, 10)),
        ({"NAME": "ViT", "WIDTH": 48, "HEADS": 3, "DEPTH": 1, "CONV_STEM": True}, (64, 32), (48, 4, 2)),
    ],
)
def test_maps_have_the_announced_channels(section: dict, size: tuple[int, int], shape: tuple[int, ...]) -> None:
    backbone = BACKBONE_REGISTRY.build(section, size)
    assert backbone.training
    images = torch.rand(2, 3, *size)
    before = images.clone()
    found = feature_map(backbone(images))
    assert found.shape == (2, *shape)
    assert backbone.out_channels == shape[0]
    assert torch.equal(images, before)


def test_torchvision_names_and_values() -> None:
    import torchvision

    backbone = TorchvisionBackbone((64, 64), model="resnet18", last_stride=2).eval()
    net = torchvision.models.resnet18(weights=None).eval()
    missing, unexpected = backbone.load_state_dict(net.state_dict(), strict=False)
    assert missing == []
    assert unexpected == ["fc.weight", "fc.bias"]
    net.avgpool, net.fc = nn.Identity(), nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(backbone(images).flatten(1), net(images))


def test_densenet_ends_with_relu() -> None:
    import torchvision

    backbone = TorchvisionBackbone((32, 32), model="densenet121", last_stride=2).eval()
    net = torchvision.models.densenet121(weights=None).eval()
    backbone.load_state_dict(net.state_dict(), strict=False)
    net.classifier = nn.Identity()
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(backbone(images).mean((2, 3)), net(images))


def test_stem_without_relu() -> None:
    images = torch.rand(2, 3, 64, 32)
    plain = TorchvisionBackbone((64, 32), model="resnet18").eval()
    bare = TorchvisionBackbone((64, 32), model="resnet18", stem_relu=False).eval()
    bare.load_state_dict(plain.state_dict())
    stem = plain.maxpool(plain.bn1(plain.conv1(images)))
    assert bool((stem < 0).any())
    torch.testing.assert_close(bare(images), plain.layer4(plain.layer3(plain.layer2(plain.layer1(stem)))))


@pytest.mark.parametrize("model", ["resnet18", "resnet50"])
def test_last_stride_keeps_the_positions_of_the_published_block(model: str) -> None:
    """A convolution of stride 1 gives at every second position what one of stride 2 gives."""
    import torchvision

    net = torchvision.models.get_model(model, weights=None).eval()
    block = copy.deepcopy(net.layer4[0])
    set_last_stride(net, 1, "here")
    conv = "conv2" if model == "resnet50" else "conv1"
    assert [m.stride for m in (getattr(net.layer4[0], conv), net.layer4[0].downsample[0])] == [(1, 1), (1, 1)]
    assert all(m.stride == (1, 1) for m in net.layer4.modules() if isinstance(m, nn.Conv2d))
    x = torch.rand(1, block.conv1.in_channels, 6, 4)
    torch.testing.assert_close(net.layer4[0].downsample(x)[..., ::2, ::2], block.downsample(x))
    if model == "resnet50":  # nothing but 1x1 convolutions follow the changed one
        torch.testing.assert_close(net.layer4[0](x)[..., ::2, ::2], block(x))


def test_other_networks_keep_their_strides_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    backbone = build("timm", (64, 32), MODEL="tf_efficientnet_lite0", LAST_STRIDE=1)
    assert backbone.eval()(torch.zeros(1, 3, 64, 32)).shape == (1, 1280, 2, 1)
    assert "timm tf_efficientnet_lite0: LAST_STRIDE 1 is defined for ResNets only" in caplog.text


def test_last_stride_of_a_shortcut_that_averages() -> None:
    backbone = TimmBackbone((64, 32), model="resnet10t")
    assert not any(isinstance(module, nn.AvgPool2d) for module in backbone.net.layer4.modules())


def test_timm_names_and_values() -> None:
    import timm

    backbone = TimmBackbone((64, 32), model="test_vit", last_stride=2).eval()
    net = timm.create_model("test_vit", num_classes=0, global_pool="", img_size=(64, 32)).eval()
    net.load_state_dict(backbone.net.state_dict())
    images = torch.rand(2, 3, 64, 32)
    out, wanted = backbone(images), net.forward_features(images)
    assert isinstance(out, Tokens)
    torch.testing.assert_close(out.tokens[:, 0], wanted[:, 0])
    torch.testing.assert_close(out.map.flatten(2).transpose(1, 2), wanted[:, -8:])


@pytest.mark.parametrize("ibn", ["a", "b"])
@pytest.mark.parametrize("depth", [18, 50])
def test_names_are_those_of_ibn_net(depth: int, ibn: str) -> None:
    names = set(ResNetIBN(SIZE, depth=depth, ibn=ibn).state_dict())
    last = "layer1.2" if depth == 50 else "layer1.1"
    if ibn == "a":
        assert {"bn1.running_mean", "layer1.0.bn1.IN.weight", "layer3.1.bn1.BN.running_var"} <= names
        assert not any(".IN." in name for name in names if name.startswith("layer4"))
    else:
        assert {"bn1.weight", f"{last}.IN.weight", "layer2.0.bn1.running_mean", f"{last}.conv2.weight"} <= names
        assert "bn1.running_mean" not in names
        assert not any(".IN." in name for name in names if name.startswith(("layer1.0", "layer3", "layer4")))


def test_ibn_normalises_one_half_by_image_and_one_by_batch() -> None:
    x = torch.randn(4, 6, 8, 5) * torch.rand(4, 6, 1, 1) + torch.rand(4, 6, 1, 1)
    out = IBN(6)(x)
    torch.testing.assert_close(out[:, :3].mean((2, 3)), torch.zeros(4, 3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[:, 3:].mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert bool((out[:, 3:].mean((2, 3)).abs() > 0.1).any())


@pytest.mark.parametrize("depth", [18, 50])
def test_variant_b_normalises_the_sum(depth: int) -> None:
    stage = ResNetIBN(SIZE, depth=depth, ibn="b").layer1.eval()
    block = stage[-1]
    x = torch.randn(2, block.conv1.in_channels, 6, 5)
    y = torch.relu(block.bn1(block.conv1(x)))
    y = block.bn2(block.conv2(y))
    if depth == 50:
        y = block.bn3(block.conv3(torch.relu(y)))
    total = x + y
    mean, var = total.mean((2, 3), keepdim=True), total.var((2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(block(x), torch.relu((total - mean) / (var + 1e-5).sqrt()), atol=1e-5, rtol=1e-4)


def test_osnet_has_the_published_number_of_parameters() -> None:
    """Torchreid states 2,193,616 for width 1: with the linear layer, and the gates of each block counted four times."""
    gates = sum(2 * (mid * (mid // 16) * 2 + mid + mid // 16) for mid in (64, 96, 128))
    linear = 512 * 512 + 512 + 2 * 512
    backbone = OSNet(SIZE)
    assert sum(p.numel() for p in backbone.parameters()) == 2_193_616 - 3 * gates - linear
    names = {"conv1.conv.weight", "conv2.0.conv2d.3.bn.bias", "conv2.2.0.conv.weight", "conv4.1.gate.fc2.bias"}
    assert names | {"conv3.0.downsample.bn.weight", "conv5.bn.running_mean"} <= set(backbone.state_dict())


def test_vit_equals_timm() -> None:
    from timm.models.vision_transformer import VisionTransformer

    backbone = ViT((64, 32), width=48, depth=2, heads=3).eval()
    net = VisionTransformer(img_size=(64, 32), embed_dim=48, depth=2, num_heads=3, num_classes=0).eval()
    net.load_state_dict(backbone.state_dict())
    images = torch.rand(2, 3, 64, 32)
    wanted = net.forward_features(images)
    out = backbone(images)
    torch.testing.assert_close(out.tokens, wanted[:, :1])
    for line in range(4):
        for column in range(2):
            torch.testing.assert_close(out.map[:, :, line, column], wanted[:, 1 + 2 * line + column])


def test_part_tokens_stand_after_the_class_token() -> None:
    backbone = ViT((64, 32), width=48, depth=1, heads=3, part_tokens=3, conv_stem=True)
    assert backbone(torch.rand(2, 3, 64, 32)).tokens.shape == (2, 4, 48)
    names = {"part_tokens", "part_pos", "patch_embed.conv.0.weight", "patch_embed.conv.4.IN.bias"}
    assert names | {"patch_embed.conv.7.running_var", "patch_embed.proj.weight"} <= set(backbone.state_dict())


def test_every_parameter_of_a_transformer_learns() -> None:
    backbone = ViT((32, 16), width=48, depth=2, heads=3, part_tokens=2, drop_path=0.0)
    out = backbone(torch.rand(2, 3, 32, 16))
    (out.map[:, 0].sum() + out.tokens[:, :, 0].sum()).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_drop_path_acts_in_training_only() -> None:
    backbone = ViT((32, 16), width=48, depth=2, heads=3, drop_path=0.9)
    images = torch.rand(16, 3, 32, 16)
    assert not torch.equal(backbone(images).tokens, backbone(images).tokens)
    backbone.eval()
    assert torch.equal(backbone(images).tokens, backbone(images).tokens)


@pytest.mark.parametrize(
    ("backbone", "end"),
    [
        (lambda: TorchvisionBackbone(SIZE, model="resnet18"), "resnet18-f37072fd.pth"),
        (lambda: TimmBackbone(SIZE, model="resnet18.tv_in1k"), "hub:timm/resnet18.tv_in1k"),
        (lambda: ResNetIBN(SIZE, depth=18), "v1.0/resnet18_ibn_a-2f571257.pth"),
        (lambda: ViT(SIZE), "hub:timm/vit_small_patch16_224.augreg_in21k_ft_in1k"),
    ],
)
def test_where_imagenet_weights_are(backbone, end: str) -> None:
    url = backbone().imagenet_url()
    assert url.startswith(("https://", "hub:"))
    assert url.endswith(end)


@pytest.mark.parametrize(
    "backbone", [SmallNet(SIZE, width=4), ResNetIBN(SIZE, depth=152), OSNet(SIZE, width=0.25), ViT(SIZE, depth=2)]
)
def test_without_published_weights_the_way_out_is_named(backbone: Backbone) -> None:
    with pytest.raises(RuntimeError, match=r"MODEL\.WEIGHTS"):
        backbone.imagenet_url()


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ({"NAME": "torchvision", "MODEL": "resnet5O"}, KeyError, r"unknown model 'resnet5O'; did you mean resnet50"),
        ({"NAME": "timm", "MODEL": "resnet5O"}, KeyError, r"unknown model 'resnet5O'; did you mean resnet"),
        (
            {"NAME": "torchvision", "MODEL": "squeezenet1_1", "LAST_STRIDE": 2},
            ValueError,
            r"squeezenet1_1: images of 8x4 pixels do not pass .*Change INPUT.SIZE",
        ),
        ({"NAME": "torchvision", "MODEL": "resnet18", "LAST_STRIDE": 3}, ValueError, r"LAST_STRIDE is 3; 1 and 2"),
        (
            {"NAME": "torchvision", "MODEL": "squeezenet1_1", "LAST_STRIDE": 2, "STEM_RELU": False},
            ValueError,
            r"STEM_RELU is an option of ResNets only",
        ),
        ({"NAME": "SmallNet", "WIDTH": 0}, ValueError, r"WIDTH 0, DEPTH 1, LAST_STRIDE 2"),
        ({"NAME": "ResNetIBN", "IBN": "c"}, ValueError, r"IBN 'c'; accepted are depths 18, 34"),
        ({"NAME": "OSNet", "WIDTH": 0.1}, ValueError, r"WIDTH is 0.1; at least 0.25"),
        ({"NAME": "ViT", "HEADS": 5}, ValueError, r"WIDTH 384 is no multiple of HEADS 5"),
        ({"NAME": "ViT", "STRIDE": 20}, ValueError, r"PATCH 16, STRIDE 20; 1 <= STRIDE <= PATCH"),
        (
            {"NAME": "ViT", "STRIDE": 12, "CONV_STEM": True},
            ValueError,
            r"STRIDE 12 with CONV_STEM.*Set STRIDE to PATCH",
        ),
        ({"NAME": "ViT", "PATCH": 32, "STRIDE": 32}, ValueError, r"32x16 pixels are smaller than PATCH 32"),
    ],
)
def test_bad_options_are_refused(section: dict, error: type[Exception], message: str) -> None:
    keys = dict(section)
    with pytest.raises(error, match=message):
        build(keys.pop("NAME"), (8, 4) if "8x4" in message else SIZE, **keys)


def test_output_that_is_no_map_is_refused() -> None:
    with pytest.raises(ValueError, match=r"here: the output has shape \(1, 1536\); a map"):
        output_shape(nn.Flatten(), SIZE, "here")


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images have 32x32 pixels, the model was built for 32x16.*INPUT.SIZE"):
        ViT(SIZE, width=48, depth=1, heads=3)(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("height", [62, 63, 65])
def test_images_with_a_part_of_a_patch_are_refused_by_the_stem(height) -> None:
    message = rf"{height}x32 pixels with CONV_STEM.*multiples of PATCH.*INPUT.SIZE to such as 64 x 32"
    with pytest.raises(ValueError, match=message):
        ViT((height, 32), width=48, depth=1, heads=3, conv_stem=True)
