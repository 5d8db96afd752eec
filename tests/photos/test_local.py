"""Local descriptors: what they hold, how they are matched, and when they count."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.photos.group import Settings, cluster
from fastreid_uns.photos.local import SHARE, LocalMatch, local_descriptors, local_match, local_similarity
from fastreid_uns.photos.view_store import ViewStore
from fastreid_uns.pseudo_labels.linkage import near_pairs


def kept(maps: torch.Tensor) -> ViewStore:
    """Activations of which the first view has these maps, and the second other ones."""
    store = ViewStore()
    views = torch.stack([maps, torch.randn(maps.shape)], dim=1)
    store.begin(views.shape, torch.float32)
    store.put(slice(0, len(maps)), views)
    return store


def by_loops(descriptors: torch.Tensor, a: int, b: int) -> float:
    """The similarity of two photos, place by place."""
    height, width = descriptors.shape[1:3]
    both = []
    for one, other in ((a, b), (b, a)):
        total = length = 0.0
        for i in range(height):
            for j in range(width):
                own = descriptors[one, i, j].double()
                near = descriptors[other, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].double().flatten(0, 1)
                total += float((F.normalize(near, dim=1) @ own).max())  # times the length of the own one
                length += float(own.norm())
        both.append(total / length)
    return sum(both) / 2


def test_places_match_within_a_window_and_count_by_their_length():
    descriptors = torch.randn(5, 4, 3, 6, generator=torch.Generator().manual_seed(0)).half()
    first, second = torch.tensor([0, 0, 1, 3]), torch.tensor([1, 4, 2, 4])
    found = local_similarity(descriptors, first, second)
    expected = [by_loops(descriptors, a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)


def test_what_moved_by_a_cell_is_alike_and_what_moved_by_two_is_not():
    image = torch.randn(1, 6, 6, 32, generator=torch.Generator().manual_seed(0))
    moved = torch.cat([image, image.roll(1, 2), image.roll(2, 2)])
    near, far = local_similarity(moved, torch.tensor([0, 0]), torch.tensor([1, 2]))
    assert near > 0.85  # one of six columns has gone round
    assert far < 0.6


def test_descriptors_are_whitened_half_the_way_and_are_of_the_photos_themselves():
    maps = torch.randn(30, 12, 14, 14, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)[:, None, None]
    found = local_descriptors(kept(maps))
    assert (found.shape, found.dtype) == ((30, 7, 7, 12), torch.float16)
    assert torch.equal(found, local_descriptors(kept(maps)))  # whatever the other views are
    cells = torch.zeros(30, 7, 7, 12)
    for i in range(7):
        for j in range(7):
            rows, columns = slice(max(2 * i - 1, 0), 2 * i + 2), slice(max(2 * j - 1, 0), 2 * j + 2)
            cells[:, i, j] = F.normalize(maps[:, :, rows, columns].mean((2, 3)), dim=1)
    flat = cells.flatten(0, 2).double()
    variances = np.linalg.eigvalsh(np.cov(flat.numpy().T, bias=True))[::-1]
    np.testing.assert_allclose(found.flatten(0, 2).double().var(0), np.sqrt(variances), rtol=0.02)


@pytest.mark.parametrize(
    ("size", "cells"), [((14, 14), (7, 7)), ((20, 10), (10, 5)), ((28, 28), (7, 7)), ((7, 7), (7, 7)), ((2, 2), (2, 2))]
)
def test_photos_of_any_size_have_about_as_many_places(size, cells):
    assert local_descriptors(kept(torch.randn(4, 8, *size))).shape[1:3] == cells


def things(count: int, each: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit rows of noisy things, (N, 16), and their numbers."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(count).repeat_interleave(each)
    middles = torch.randn(count, 16, generator=generator)
    return F.normalize(middles[truth] + noise * torch.randn(count * each, 16, generator=generator)), truth


def placed(truth: torch.Tensor, noise: float) -> torch.Tensor:
    """Descriptors that tell things apart."""
    generator = torch.Generator().manual_seed(1)
    grids = torch.randn(int(truth.max()) + 1, 4, 4, 8, generator=generator)
    return grids[truth] + noise * torch.randn(len(truth), 4, 4, 8, generator=generator)


def test_descriptors_count_where_they_tell_more_than_features():
    feats, truth = things(20, 10, 0.8)
    telling, silent = placed(truth, 0.5), torch.randn(200, 4, 4, 8, generator=torch.Generator().manual_seed(2))
    assert local_match(telling, feats, truth, 30) is not None
    misleading = placed(torch.arange(200) % 10, 0.5)  # photos of one thing are all unlike
    assert local_match(misleading, feats, truth, 30) is None
    assert local_match(telling, feats, torch.zeros(200, dtype=torch.int64), 30) is None  # there is one group only
    assert local_match(telling, feats, torch.arange(200), 30) is None  # there is none
    found = [cluster(feats, Settings(k1=(10,)), local=local).labels for local in (None, LocalMatch(telling))]
    right = [(labels[:, None] == labels) == (truth[:, None] == truth).numpy() for labels in found]
    assert right[1].mean() > right[0].mean()
    assert LocalMatch(silent)(*near_pairs(feats, 30)).isfinite().all()


def test_similarities_have_the_mean_and_share_of_the_cosines():
    feats, truth = things(20, 10, 0.8)
    descriptors = placed(truth, 0.5)
    first, second, cosine = near_pairs(feats, 30)
    found = LocalMatch(descriptors)(first, second, cosine)
    local = local_similarity(descriptors, first, second)
    assert float(found.mean()) == pytest.approx(float(cosine.mean()), abs=1e-5)
    rest = (found - (1 - SHARE) * cosine - SHARE * cosine.mean()) / (SHARE * cosine.std())
    torch.testing.assert_close(rest, (local - local.mean()) / local.std(), atol=1e-4, rtol=0)
    one = LocalMatch(descriptors)(first[:1], second[:1], cosine[:1])
    torch.testing.assert_close(one, cosine[:1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_photos_are_grouped(count):
    feats = F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(0)))
    local = LocalMatch(torch.randn(count, 4, 4, 8))
    assert len(cluster(feats, Settings(k1=(3,)), local=local).labels) == count
    assert math.isfinite(sum(cluster(feats, Settings(k1=(3,)), local=local).confidence))
