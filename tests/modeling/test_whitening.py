"""View whitening: what it does to directions whose variances are known, and with very few images."""

from __future__ import annotations

import io

import pytest
import torch

from fastreid_uns.modeling.backbones.base import Tokens
from fastreid_uns.modeling.heads import PooledHead
from fastreid_uns.modeling.whitening import ViewWhitening


def corners(a: float, b: float) -> torch.Tensor:
    """Four points whose two coordinates have variances a and b, uncorrelated."""
    return torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * torch.tensor([a, b]).sqrt()


def test_one_view_is_whitened_half_the_way():
    points = corners(16, 1)[:, None] + 5
    found = ViewWhitening(2, 2).fit(points)(points[:, 0])
    # variances 16 and 1 become their roots, the larger first
    torch.testing.assert_close(found.abs(), torch.tensor([2.0, 1]).expand(4, 2))
    torch.testing.assert_close(found.T @ found / 4, torch.diag(torch.tensor([4.0, 1])))


def test_directions_in_which_views_differ_are_weakened():
    images = corners(1, 1)
    noise = torch.tensor([[0.0, 3], [0, -3]])
    views = images[:, None] + noise
    whitening = ViewWhitening(2, 2).fit(views)
    across_images, across_views = whitening(torch.tensor([[1.0, 0], [0, 1], [0, 0]])).diff(dim=0).abs().amax(1)
    lengths = (whitening.projection.norm(dim=1)).tolist()
    assert lengths[0] > 2 * lengths[1]
    assert across_images > 0
    assert across_views > 0
    # residuals: variance 0 and 18, a ridge of 0.03 * 9 on both; the fourth root of the variance of the means after it
    root = torch.tensor([0.27, 18.27]) ** -0.5
    expected = root / (root**2) ** 0.25
    torch.testing.assert_close(torch.tensor(lengths), expected, rtol=1e-4, atol=1e-5)


def test_the_mean_of_views_may_be_taken_before_or_after():
    views = torch.randn(30, 3, 8, generator=torch.Generator().manual_seed(0))
    whitening = ViewWhitening(8, 4).fit(views)
    torch.testing.assert_close(whitening(views).mean(1), whitening(views.mean(1)))
    torch.testing.assert_close(whitening(views).mean((0, 1)), torch.zeros(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_images_span_few_directions(count):
    views = torch.randn(count, 3, 20, generator=torch.Generator().manual_seed(1))
    found = ViewWhitening(20, 10).fit(views)(views.mean(1))
    assert found.isfinite().all()
    assert found[:, : count - 1].abs().amin(1).gt(0).all()
    assert not found[:, count - 1 :].any()


def test_equal_images_give_zeros():
    found = ViewWhitening(6, 3).fit(torch.ones(4, 2, 6))(torch.ones(4, 6))
    assert not found.any()


def test_the_map_is_part_of_the_state():
    views = torch.randn(30, 3, 8, generator=torch.Generator().manual_seed(2))
    first, second = ViewWhitening(8, 4).fit(views), ViewWhitening(8, 4)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(first(views), second(views))


def test_pooled_head_holds_both_poolings_and_whitens_them():
    x = torch.rand(5, 3, 4, 2, generator=torch.Generator().manual_seed(3))
    average, gem = x.mean((2, 3)), x.pow(3).mean((2, 3)).pow(1 / 3)
    expected = torch.cat([average / average.norm(dim=1, keepdim=True), gem / gem.norm(dim=1, keepdim=True)], 1)
    plain, head = PooledHead(3), PooledHead(3, dim=4)
    assert (plain.dim, head.dim) == (6, 4)
    torch.testing.assert_close(plain(x).pooled, expected)
    torch.testing.assert_close(plain(x).feats, expected / 2**0.5)
    head.whitening.fit(expected[:, None])
    torch.testing.assert_close(head(x).unnormalized, head.whitening(expected))
    torch.testing.assert_close(head(Tokens(x, x.mean((2, 3))[:, None])).feats.norm(dim=1), torch.ones(5))
    assert not any(parameter.requires_grad for parameter in head.parameters())
    with pytest.raises(ValueError, match=r"MODEL.HEAD.DIM is -1"):
        PooledHead(3, dim=-1)
