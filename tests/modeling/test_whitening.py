"""View whitening: what it does to directions whose variances are known, and with very few images."""

from __future__ import annotations

import io

import pytest
import torch

from fastreid_uns.modeling.backbones.base import Tokens
from fastreid_uns.modeling.heads import PooledHead, grid_cells
from fastreid_uns.modeling.whitening import MainDirections, ViewWhitening


def corners(a: float, b: float) -> torch.Tensor:
    """Four points whose two coordinates have variances a and b, uncorrelated."""
    return torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]) * torch.tensor([a, b]).sqrt()


def test_one_view_is_whitened_half_the_way():
    points = corners(16, 1)[:, None] + 5
    found = ViewWhitening(2, 2).fit(MainDirections.of(points, 2))(points[:, 0])
    # variances 16 and 1 become their roots, the larger first
    torch.testing.assert_close(found.abs(), torch.tensor([2.0, 1]).expand(4, 2))
    torch.testing.assert_close(found.T @ found / 4, torch.diag(torch.tensor([4.0, 1])))


def test_directions_in_which_views_differ_are_weakened():
    images = corners(1, 1)
    noise = torch.tensor([[0.0, 3], [0, -3]])
    views = images[:, None] + noise
    whitening = ViewWhitening(2, 2).fit(MainDirections.of(views, 2))
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
    whitening = ViewWhitening(8, 4).fit(MainDirections.of(views, 4))
    torch.testing.assert_close(whitening(views).mean(1), whitening(views.mean(1)))
    torch.testing.assert_close(whitening(views).mean((0, 1)), torch.zeros(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_few_images_span_few_directions(count):
    views = torch.randn(count, 3, 20, generator=torch.Generator().manual_seed(1))
    found = ViewWhitening(20, 10).fit(MainDirections.of(views, 10))(views.mean(1))
    assert found.isfinite().all()
    assert found[:, : count - 1].abs().amin(1).gt(0).all()
    assert not found[:, count - 1 :].any()


def test_equal_images_give_zeros():
    found = ViewWhitening(6, 3).fit(MainDirections.of(torch.ones(4, 2, 6), 3))(torch.ones(4, 6))
    assert not found.any()


def test_the_map_is_part_of_the_state():
    views = torch.randn(30, 3, 8, generator=torch.Generator().manual_seed(2))
    first, second = ViewWhitening(8, 4).fit(MainDirections.of(views, 4)), ViewWhitening(8, 4)
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
    head.whitening.fit(MainDirections.of(expected[:, None], 4))
    torch.testing.assert_close(head(x).unnormalized, head.whitening(expected))
    torch.testing.assert_close(head(Tokens(x, x.mean((2, 3))[:, None])).feats.norm(dim=1), torch.ones(5))
    assert not any(parameter.requires_grad for parameter in head.parameters())
    with pytest.raises(ValueError, match=r"MODEL.HEAD.DIM is -1"):
        PooledHead(3, dim=-1)


def test_main_directions_of_many_numbers_are_those_of_the_covariance():
    draw = torch.Generator().manual_seed(5)
    scale = torch.logspace(0, -2, 300)
    views = (torch.randn(200, 2, 300, generator=draw) * scale) @ torch.linalg.qr(
        torch.randn(300, 300, generator=draw)
    ).Q
    found = MainDirections.of(views, 20)
    rows = views.flatten(0, 1).double()
    variance, directions = torch.linalg.eigh(torch.cov(rows.T, correction=0))
    expected = directions.flip(1)[:, :20]
    torch.testing.assert_close(found.directions.T @ found.directions, torch.eye(20).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close((expected.T @ found.directions).abs(), torch.eye(20).double(), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        found.views.flatten(0, 1).double(), (rows - rows.mean(0)) @ found.directions, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        found.views.flatten(0, 1).var(0, correction=0).double(), variance.flip(0)[:20], rtol=1e-3, atol=0
    )


def test_directions_in_which_the_images_of_a_group_differ_are_weakened():
    # one view each; groups differ in the first number, the images of a group in the second
    images = torch.tensor([[3.0, 2], [3, -2], [-3, 2], [-3, -2]])
    found = MainDirections.of(images[:, None], 2)
    alone = ViewWhitening(2, 2).fit(found, torch.arange(4))
    torch.testing.assert_close(alone(images), ViewWhitening(2, 2).fit(found)(images))
    grouped = ViewWhitening(2, 2).fit(found, torch.tensor([7, 7, 2, 2]))
    # within groups: variance 0 and 4 * 4 / 2 = 8, a ridge of 0.03 * 4 on both; variances 9 and 4 of the images
    root = torch.tensor([0.12, 8.12]) ** -0.5
    expected = root * torch.tensor([3.0, 2]) / (root**2 * torch.tensor([9.0, 4])) ** 0.25
    torch.testing.assert_close(grouped(images).abs(), expected.expand(4, 2), rtol=1e-4, atol=1e-5)


def test_views_and_groups_count_evenly():
    draw = torch.Generator().manual_seed(6)
    views = torch.randn(40, 3, 5, generator=draw) + torch.randn(40, 1, 5, generator=draw)
    groups = torch.arange(40) // 4
    found = MainDirections.of(views, 5)
    whitening = ViewWhitening(5, 5).fit(found, groups)
    means = views.mean(1)
    of_views = sum(torch.cov(image.T, correction=0) * 3 for image in views) / (40 * 2)
    of_groups = sum(torch.cov(means[groups == group].T, correction=0) * 4 for group in range(10)) / (40 - 10)
    within = (of_views + of_groups) / 2
    within += 0.03 * within.diagonal().mean() * torch.eye(5)
    variance, directions = torch.linalg.eigh(within)
    white = (means - means.mean(0)) @ (directions / variance.sqrt())
    size, outer = torch.linalg.eigh(white.T @ white / 40)
    expected = white @ outer / size**0.25
    gram = whitening(means) @ whitening(means).T  # axes may be mirrored or in another order
    torch.testing.assert_close(gram, expected @ expected.T, rtol=1e-3, atol=1e-4)


def test_cells_of_a_grid_overlap_where_it_does_not_divide_the_map():
    x = torch.arange(6.0).view(1, 1, 3, 2)
    # lines 0 to 1 and 1 to 2; columns 0 and 1
    assert grid_cells(x, 2)[0, :, :, 0].tolist() == [[1, 2], [3, 4]]
    head = PooledHead(1, grid=2)
    assert head.dim == 6
    cells = torch.tensor([1.0, 2, 3, 4]) / 30**0.5
    torch.testing.assert_close(head(x).pooled, torch.cat([torch.ones(2), cells])[None])
    with pytest.raises(ValueError, match=r"MODEL.HEAD.GRID is -1"):
        PooledHead(3, grid=-1)
