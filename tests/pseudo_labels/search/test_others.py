"""Neighbours of other groups, against a plain loop in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.pseudo_labels.search.exact import nearest_among, nearest_of_others
from fastreid_uns.pseudo_labels.search.gpu import search_by_rows


def random_feats(n: int, d: int = 12, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def by_loop(feats: torch.Tensor, groups: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    rows = feats.double().numpy()
    sq, index = np.full((len(rows), k), np.inf, np.float32), np.full((len(rows), k), -1)
    for i, row in enumerate(rows):
        others = [j for j in range(len(rows)) if groups[j] != groups[i]]
        distance = {j: np.float32(((row - rows[j]) ** 2).sum()) for j in others}
        best = sorted(others, key=lambda j: (distance[j], j))[:k]
        sq[i, : len(best)], index[i, : len(best)] = [distance[j] for j in best], best
    return sq, index


def grid(n: int) -> torch.Tensor:
    return torch.randint(-1, 2, (n, 3), generator=torch.Generator().manual_seed(n)) / 4


def by_rows(feats: torch.Tensor, groups: torch.Tensor, k: int, block: int = 2048):
    sq, index = search_by_rows(feats.float(), k, block, groups)
    return sq, torch.where(sq.isinf(), -1, index)


SIZES = [(200, 4, 9, 64), (150, 2, 150, 32), (90, 90, 5, 2048)]
CASES = [
    (search, feats, size) for search in (nearest_of_others, by_rows) for feats in (random_feats, grid) for size in SIZES
]


@pytest.mark.parametrize(("search", "feats", "size"), CASES)
def test_equal_to_a_loop(search, feats, size):
    n, cameras, k, block = size
    rows = feats(n)
    groups = torch.randint(0, cameras, (n,), generator=torch.Generator().manual_seed(1))
    sq, index = search(rows, groups, k, block=block)
    expected_sq, expected = by_loop(rows, groups, k)
    np.testing.assert_array_equal(sq.numpy(), expected_sq)
    np.testing.assert_array_equal(index.numpy(), expected)


@pytest.mark.parametrize("search", [nearest_of_others, by_rows])
def test_one_group_has_no_others(search):
    sq, index = search(random_feats(10), torch.zeros(10, dtype=torch.int64), 3)
    assert bool(sq.isinf().all())
    assert bool((index == -1).all())


@pytest.mark.parametrize("block", [16, 2048])
def test_nearest_among_equals_a_loop(block):
    queries, candidates = random_feats(40, seed=1), torch.cat([random_feats(70, seed=2), random_feats(40, seed=1)[:5]])
    sq, index = nearest_among(queries, candidates, 6, block=block)
    distance = ((queries.double()[:, None] - candidates.double()) ** 2).sum(2).float()
    expected = distance.sort(dim=1, stable=True)
    torch.testing.assert_close(sq, expected.values[:, :6], rtol=0, atol=0)
    assert torch.equal(index, expected.indices[:, :6])


def test_what_cannot_be_searched():
    with pytest.raises(ValueError, match=r"k is 4; it must lie in 1..3, the candidates"):
        nearest_among(random_feats(5), random_feats(3), 4)
    with pytest.raises(ValueError, match="4 groups for 5 images"):
        nearest_of_others(random_feats(5), torch.zeros(4), 2)
