"""Grids of position embeddings: stated, recorded, measured, square, or asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fastreid_uns.config import load_config
from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.backbones.timm_net import TimmBackbone
from fastreid_uns.modeling.backbones.vit import ViT
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.modeling.positions import Positions, measured_grid
from fastreid_uns.modeling.weights import load_weights

VIT = {"width": 48, "depth": 1, "heads": 3}


def smooth(height: int, width: int, channels: int = 48, noise: float = 0.3, seed: int = 0) -> Tensor:
    """(1,h*w,C) of waves over an image plus noise: neighbours are alike, as in a trained embedding."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(height) / 16, torch.arange(width) / 16, indexing="ij")
    along = torch.randn(2, channels, generator=generator) * 3
    waves = torch.sin(y[..., None] * along[0] * 2 + x[..., None] * along[1] * 2 + torch.arange(channels))
    return (waves + noise * torch.randn(waves.shape, generator=generator)).reshape(1, height * width, channels)


GRIDS = [(14, 14), (16, 8), (8, 16), (24, 8), (16, 12), (12, 16), (21, 10), (32, 18), (24, 24)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_grid_of_a_trained_embedding_is_measured(grid: tuple[int, int], seed: int) -> None:
    assert measured_grid(smooth(*grid, seed=seed)[0]) == grid


@pytest.mark.parametrize("count", [128, 192, 196, 7, 1])
def test_numbers_without_order_have_no_grid(count: int) -> None:
    assert measured_grid(torch.randn(count, 48, generator=torch.Generator().manual_seed(count))) is None
    assert measured_grid(torch.zeros(count, 48)) is None


@pytest.mark.parametrize(
    ("source", "target"), [((256, 192), (256, 128)), ((128, 256), (256, 128)), ((224, 224), (256, 128))], ids=str
)
@pytest.mark.parametrize("way", ["stated", "recorded", "checkpoint", "measured"])
def test_a_grid_of_any_shape_arrives(
    source: tuple[int, int], target: tuple[int, int], way: str, tmp_path: Path
) -> None:
    """The value at each place is that of bicubic interpolation of the true grid, worked out channel by channel."""
    old = (source[0] // 16, source[1] // 16)
    net = ViT(source, **VIT)
    values = torch.cat([torch.full((1, 1, 48), 7.0), smooth(*old, noise=0.3 if way == "measured" else 9.0)], dim=1)
    net.pos_embed.data.copy_(values)
    state = net.state_dict()
    content = state if way == "recorded" else dict(state)  # a plain dict has nothing beside its tensors
    if way == "checkpoint":
        keys = ["MODEL.BACKBONE={NAME: ViT, WIDTH: 48, DEPTH: 1, HEADS: 3}", f"INPUT.SIZE={list(source)}"]
        content = {
            "model": {f"encoder.backbone.{k}": v for k, v in content.items()},
            "config": load_config(overrides=keys).dump(),
        }
    torch.save(content, tmp_path / "w.pth")
    backbone = ViT(target, **VIT, pretrained_grid=old if way == "stated" else ())
    report = load_weights(backbone, str(tmp_path / "w.pth"))
    new = (target[0] // 16, target[1] // 16)
    image = values[0, 1:].reshape(*old, 48)
    for channel in (0, 31):
        wanted = F.interpolate(image[None, None, :, :, channel], size=new, mode="bicubic", align_corners=False)
        torch.testing.assert_close(backbone.pos_embed[0, 1:, channel].detach(), wanted.flatten(), rtol=1e-4, atol=1e-4)
    assert (backbone.pos_embed[0, 0] == 7).all()
    assert len(report.reshaped) == 1


def test_safetensors_keep_no_record_and_the_key_helps(tmp_path: Path) -> None:
    save_file(ViT((256, 192), **VIT).state_dict(), tmp_path / "w.safetensors")
    file = str(tmp_path / "w.safetensors")
    with pytest.raises(InvalidValue, match=r"192 patches in an unknown grid; of 16x12, 12x16, 24x8, .*PRETRAINED_GRID"):
        load_weights(ViT((256, 128), **VIT), file)
    assert load_weights(ViT((256, 128), **VIT, pretrained_grid=[16, 12]), file).share == 1.0


def test_a_square_count_without_order_is_square() -> None:
    value = torch.randn(1, 197, 48, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(value[:, 1:].mT.reshape(1, 48, 14, 14), size=(16, 8), mode="bicubic", align_corners=False)
    torch.testing.assert_close(Positions((16, 8)).fit(value, 129)[:, 1:], wanted.flatten(2).mT)


def test_the_right_count_without_order_is_taken_as_it_is() -> None:
    value = torch.randn(1, 129, 48, generator=torch.Generator().manual_seed(0))
    assert Positions((16, 8)).fit(value, 129) is value


def test_a_recorded_grid_of_another_count_does_not_count() -> None:
    value = smooth(12, 16)
    assert Positions((12, 16)).fit(value, 192, recorded=(14, 14)) is value


@pytest.mark.parametrize(
    ("resize", "options"),
    [("bilinear", {"mode": "bilinear"}), ("antialiased", {"mode": "bicubic", "antialias": True})],
)
def test_ways_to_resize(resize: str, options: dict) -> None:
    value = smooth(24, 24)
    wanted = F.interpolate(value.mT.reshape(1, 48, 24, 24), size=(16, 8), align_corners=False, **options)
    torch.testing.assert_close(Positions((16, 8), resize=resize).fit(value, 128), wanted.flatten(2).mT)


def test_a_published_network_of_timm_states_its_grid() -> None:
    backbone = TimmBackbone((64, 32), model="test_vit")
    assert (backbone.grid, backbone.published_grid) == ((4, 2), (10, 10))  # 160x160 pixels, patches of 16


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pretrained_grid": [24, 6]}, r"PRETRAINED_GRID is 24x6, but .* has 128 patches, such as 16x8, 8x16"),
        ({"pretrained_grid": [16]}, r"PRETRAINED_GRID is \[16\]; \[\] or lines and columns"),
        ({"pretrained_grid": ["a", 8]}, r"PRETRAINED_GRID is \['a', 8\]"),
        ({"pretrained_grid": [-16, -8]}, r"PRETRAINED_GRID is \[-16, -8\]"),
        ({"position_resize": "nearest"}, r"POSITION_RESIZE: 'nearest' is unknown; accepted: bicubic, bilinear"),
    ],
)
def test_bad_keys(keys: dict, message: str, tmp_path: Path) -> None:
    torch.save(dict(ViT((256, 128), **VIT).state_dict()), tmp_path / "w.pth")
    with pytest.raises(InvalidValue, match=message):
        load_weights(ViT((256, 128), **VIT, **keys), str(tmp_path / "w.pth"))


def test_a_network_without_positions_refuses_a_grid_for_them() -> None:
    with pytest.raises(InvalidValue, match=r"resnet18: PRETRAINED_GRID is set, but it has no position embedding"):
        TimmBackbone((64, 32), model="resnet18", pretrained_grid=[14, 14])


def test_the_keys_reach_the_backbone(tmp_path: Path) -> None:
    torch.save(dict(ViT((192, 256), **VIT).state_dict()), tmp_path / "w.pth")
    keys = "{NAME: ViT, WIDTH: 48, DEPTH: 1, HEADS: 3, PRETRAINED_GRID: [12, 16], POSITION_RESIZE: bilinear}"
    cfg = load_config(
        overrides=[f"MODEL.BACKBONE={keys}", f"MODEL.WEIGHTS={tmp_path / 'w.pth'}", "INPUT.SIZE=[64, 32]"]
    )
    positions = build_model(cfg, 4).encoder.backbone.positions
    assert (positions.grid, tuple(positions.pretrained), positions.resize) == ((4, 2), (12, 16), "bilinear")
