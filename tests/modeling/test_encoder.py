"""Normalisation of the pixels, and what an encoder hands through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastreid_uns.modeling.backbones.small_net import SmallNet
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.heads import EmbeddingHead, Pool
from fastreid_uns.modeling.norm import domain_batch_norm, ghost_batch_norm
from fastreid_uns.structures import HeadOutput

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


class Bare(nn.Module):
    """A head that hands the mean of the map through."""

    dim = 3

    def forward(self, x: torch.Tensor) -> HeadOutput:
        return HeadOutput(Pool("avg")(x).squeeze(1), x)


def small(**options) -> Encoder:
    backbone = SmallNet((32, 16), width=8)
    return Encoder(backbone, EmbeddingHead(backbone.out_channels, **options), mean=MEAN, std=STD)


def test_pixels_are_normalised_by_channel() -> None:
    encoder = Encoder(nn.Identity(), Bare(), mean=MEAN, std=STD)
    images = torch.rand(2, 3, 4, 5)
    before = images.clone()
    got = encoder(images).feats
    for channel in range(3):
        torch.testing.assert_close(got[:, channel], (before[:, channel] - MEAN[channel]) / STD[channel])
    assert torch.equal(images, before)


def test_bytes_are_taken_for_0_to_1() -> None:
    encoder = Encoder(nn.Identity(), Bare(), mean=[0, 0, 0], std=[1, 1, 1])
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    torch.testing.assert_close(encoder(images).feats.flatten(), torch.tensor([0.0, 0.2, 1.0]))
    assert images.dtype == torch.uint8


def test_numbers_of_the_pixels_are_no_weights() -> None:
    encoder = small()
    assert not {"mean", "std"} & set(encoder.state_dict())
    assert encoder.mean.dtype == torch.float32
    assert encoder.dim == 64


@pytest.mark.parametrize("size", [(32, 16), (33, 17), (20, 50)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_size_and_layout(size: tuple[int, int], channels_last: bool) -> None:
    encoder = small(pooling="gem")
    images = torch.randint(0, 256, (4, 3, *size), dtype=torch.uint8)
    wanted = encoder(images)
    if channels_last:
        encoder = encoder.to(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last)
    out = encoder(images)
    torch.testing.assert_close(out.feats.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(out.feats, wanted.feats, atol=1e-4, rtol=1e-3)


def test_autocast_gives_float32_features_near_the_exact_ones() -> None:
    encoder = small().eval()
    images = torch.rand(6, 3, 32, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = encoder(images)
    assert out.feats.dtype == torch.float32
    assert bool(((out.feats * encoder(images).feats).sum(1) > 0.99).all())


def test_domains_reach_the_norm_layers_and_leave_again() -> None:
    encoder = small()
    domain_batch_norm(encoder, 2)
    ghost_batch_norm(encoder, 2)
    stem, neck = encoder.backbone.stem[0][1], encoder.head.embed.neck
    encoder(torch.rand(6, 3, 32, 16), torch.tensor([1, 1, 0, 0, 0, 0]))
    for layer in (stem, neck):
        assert [int(norm.num_batches_tracked) for norm in layer.domains] == [1, 1]
        assert not torch.equal(layer.domains[0].running_mean, layer.domains[1].running_mean)
    assert stem.rows.runs is None


def test_all_parameters_but_the_frozen_bias_get_gradients() -> None:
    encoder = small(pooling="gem", dim=4)
    encoder(torch.rand(4, 3, 32, 16)).feats[:, 0].sum().backward()
    without = [name for name, parameter in encoder.named_parameters() if parameter.grad is None]
    assert without == ["head.embed.neck.bias"]


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5] * 3), ([0.5] * 3, [0.5, 0.0, 0.5])])
def test_impossible_numbers_are_refused(mean: list[float], std: list[float]) -> None:
    with pytest.raises(ValueError, match=r"INPUT.MEAN .* three numbers each"):
        Encoder(nn.Identity(), Bare(), mean=mean, std=std)
