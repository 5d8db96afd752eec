"""Pooling, necks, parts and tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.modeling.backbones.base import Tokens
from fastreid_uns.modeling.heads import EmbeddingHead, PartHead, Pool, TokenHead

GOLDEN = Path(__file__).parents[1] / "golden" / "cc_gem.npz"


def slow_pool(kind: str, x: Tensor) -> Tensor:
    """(B,C) over all positions, one value after the other."""
    out = torch.zeros(x.shape[:2], dtype=x.dtype)
    for b in range(x.shape[0]):
        for c in range(x.shape[1]):
            values = [float(v) for v in x[b, c].flatten()]
            mean = sum(values) / len(values)
            gem = (sum(max(v, 1e-6) ** 3 for v in values) / len(values)) ** (1 / 3)
            out[b, c] = {"avg": mean, "max": max(values), "avgmax": mean + max(values), "gem": gem}[kind]
    return out


@pytest.mark.parametrize("kind", ["avg", "max", "avgmax", "gem"])
@pytest.mark.parametrize(("height", "stripes"), [(6, [(0, 2), (2, 4), (4, 6)]), (7, [(0, 3), (2, 5), (4, 7)])])
def test_pooling_of_stripes_equals_a_plain_loop(kind: str, height: int, stripes: list[tuple[int, int]]) -> None:
    x = torch.randn(2, 3, height, 5, dtype=torch.float64)
    wanted = torch.stack([slow_pool(kind, x[:, :, a:b]) for a, b in stripes], dim=1)
    torch.testing.assert_close(Pool(kind, 3).double()(x), wanted)
    torch.testing.assert_close(Pool(kind).double()(x), slow_pool(kind, x)[:, None])


def test_stripes_of_sixteen_lines_overlap_as_adaptive_pooling_does() -> None:
    x = torch.randn(2, 3, 16, 4)
    wanted = F.adaptive_avg_pool2d(x, (3, 1)).squeeze(3).transpose(1, 2)
    torch.testing.assert_close(Pool("avg", 3)(x), wanted)


def test_gem_equals_cluster_contrast() -> None:
    golden = {name: torch.from_numpy(np.atleast_1d(value)) for name, value in np.load(GOLDEN).items()}
    x = golden["x"].requires_grad_()
    pool = Pool("gem")
    assert float(pool.p.detach()) == float(golden["p"])
    out = pool(x)[:, 0, :, None, None]
    (out * golden["upstream"]).sum().backward()
    torch.testing.assert_close(out, golden["out"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(x.grad, golden["grad_x"], atol=3e-6, rtol=0)
    torch.testing.assert_close(pool.p.grad, golden["grad_p"], atol=3e-6, rtol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("neck", ["bnneck", "none"])
@pytest.mark.parametrize("dim", [0, 4])
def test_embedding_head(dim: int, neck: str, channels_last: bool) -> None:
    head = EmbeddingHead(6, dim=dim, neck=neck)
    x = torch.rand(5, 6, 3, 2)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    out = head(x)
    unnormalized = pooled = x.mean((2, 3))
    if dim:
        unnormalized = unnormalized @ head.embed.project.weight.T + head.embed.project.bias
    if neck == "bnneck":
        unnormalized = (unnormalized - unnormalized.mean(0)) / (unnormalized.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(out.pooled, pooled)
    torch.testing.assert_close(out.feats, unnormalized / unnormalized.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)
    assert out.feats.shape == (5, head.dim)
    assert head.dim == (dim or 6)
    assert out.parts is None


def test_bias_of_the_neck_is_frozen_at_zero() -> None:
    neck = EmbeddingHead(6).embed.neck
    assert isinstance(neck, nn.BatchNorm1d)
    assert not neck.bias.requires_grad
    assert neck.weight.requires_grad
    assert bool((neck.bias == 0).all())
    assert bool((neck.weight == 1).all())


@pytest.mark.parametrize("head", [EmbeddingHead(8, pooling="gem", dim=4), PartHead(8, pooling="gem")])
def test_features_are_float32_of_unit_length_under_autocast(head: nn.Module) -> None:
    x = torch.rand(4, 8, 6, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(x.bfloat16())
    torch.testing.assert_close(out.feats.norm(dim=1), torch.ones(4))
    assert out.feats.dtype == out.pooled.dtype == torch.float32
    torch.testing.assert_close(out.pooled, head.pool(x.bfloat16().float()).squeeze(1))
    if out.parts is not None:
        torch.testing.assert_close(out.parts.norm(dim=2), torch.ones(4, 3))


@pytest.mark.parametrize("dim", [0, 5])
def test_part_head_equals_one_head_for_each_stripe(dim: int) -> None:
    head = PartHead(4, parts=2, pooling="max", dim=dim)
    x = torch.randn(6, 4, 5, 3)
    out = head(x)
    assert out.parts is not None
    assert out.parts.shape == (6, 2, dim or 4)
    for i, stripe in enumerate((x[:, :, :3], x[:, :, 2:])):
        alone = EmbeddingHead(4, pooling="max", dim=dim)
        alone.embed = head.part_embed[i]
        torch.testing.assert_close(out.parts[:, i], alone(stripe).feats)
    whole = EmbeddingHead(4, pooling="max", dim=dim)
    whole.embed = head.embed
    torch.testing.assert_close(out.feats, whole(x).feats)


def test_global_and_part_gem_learn_their_own_exponent() -> None:
    head = PartHead(4, pooling="gem")
    out = head(torch.rand(4, 4, 6, 2))
    out.feats[:, 0].sum().backward()
    assert head.pool.p.grad is not None
    assert head.part_pool.p.grad is None


def test_map_with_fewer_lines_than_parts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PARTS is 6 but the feature map has 4 lines.*INPUT.SIZE"):
        PartHead(4, parts=6)(torch.zeros(2, 4, 4, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "mean"}, r"HEAD.POOLING: 'mean' is unknown; accepted: avg, max, avgmax, gem"),
        ({"neck": "bn"}, r"HEAD.NECK: 'bn' is unknown; accepted: bnneck, none"),
        ({"dim": -1}, r"HEAD.DIM is -1; 0"),
        ({"parts": 1}, r"HEAD.PARTS is 1; 2 or more"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartHead(4, **options)


TOKENS = Tokens(torch.randn(5, 4, 3, 2), torch.randn(5, 4, 4))


@pytest.mark.parametrize("fuse", ["class", "mean", "cat"])
def test_token_head(fuse: str) -> None:
    head = TokenHead(4, fuse=fuse, neck="none")
    out = head(TOKENS)
    c = TOKENS.tokens[:, 0]
    m = (TOKENS.tokens[:, 1] + TOKENS.tokens[:, 2] + TOKENS.tokens[:, 3]) / 3
    wanted = {"class": c, "mean": 0.5 * c + 0.5 * m, "cat": torch.cat([c, m], 1)}[fuse]
    torch.testing.assert_close(out.pooled, wanted)
    torch.testing.assert_close(out.feats, wanted / wanted.norm(dim=1, keepdim=True))
    assert head.dim == out.feats.shape[1]


def test_embedding_head_pools_the_patches_of_a_transformer() -> None:
    torch.testing.assert_close(EmbeddingHead(4)(TOKENS).pooled, TOKENS.map.mean((2, 3)))


def test_token_head_says_what_the_backbone_lacks() -> None:
    with pytest.raises(ValueError, match=r"feature map without tokens.*EmbeddingHead"):
        TokenHead(4)(TOKENS.map)
    with pytest.raises(ValueError, match=r"FUSE is cat but the backbone gives no part tokens.*PART_TOKENS"):
        TokenHead(4, fuse="cat")(Tokens(TOKENS.map, TOKENS.tokens[:, :1]))
    with pytest.raises(ValueError, match=r"FUSE: 'sum' is unknown; accepted: class, mean, cat"):
        TokenHead(4, fuse="sum")


@pytest.mark.parametrize("head", [EmbeddingHead(4), PartHead(4, parts=2)])
def test_raw_features_point_where_the_unit_features_point(head: nn.Module) -> None:
    out = head(torch.randn(6, 4, 4, 2, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(out.unnormalized / out.unnormalized.norm(dim=1, keepdim=True), out.feats)
    assert (out.unnormalized.norm(dim=1) - 1).abs().min() > 0.01
    assert (out.unnormalized_parts is None) == (out.parts is None)
    if out.parts is not None:
        torch.testing.assert_close(out.unnormalized_parts / out.unnormalized_parts.norm(dim=2, keepdim=True), out.parts)
