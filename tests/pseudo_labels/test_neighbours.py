from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.pseudo_labels import kernels, neighbours
from fastreid_uns.pseudo_labels.neighbours import nearest_neighbours, neighbours_and_farthest

SEARCHES = {"each pair once": neighbours._search_each_pair_once, "by rows": neighbours._search_by_rows}


def random_feats(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def grid_feats(n: int, d: int = 3) -> torch.Tensor:
    """Multiples of a quarter: many doubles and ties, and every product is exact in float32."""
    return torch.randint(-1, 2, (n, d), generator=torch.Generator().manual_seed(n)) / 4


def by_definition(feats: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared distances by differences, in float64, sorted by (not itself, distance, index)."""
    x = feats.double().numpy()
    sq = ((x[:, None] - x[None]) ** 2).sum(2)
    index = np.stack([np.lexsort((np.arange(len(x)), row, np.arange(len(x)) != i))[:k] for i, row in enumerate(sq)])
    near = np.take_along_axis(sq, index, 1)
    return torch.from_numpy(near).float(), torch.from_numpy(index), torch.from_numpy(sq.max(1)).float()


@pytest.mark.parametrize("block", [7, 64, 300])
@pytest.mark.parametrize("search", SEARCHES)
def test_ties_go_to_the_lower_index_whatever_the_block(search, block):
    feats = grid_feats(131)
    expected = by_definition(feats, 30)
    found = SEARCHES[search](feats, feats.square().sum(1), 30, block)
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("n", "d", "k"), [(157, 33, 30), (64, 16, 64), (5, 1, 1), (1, 4, 1)])
def test_equals_the_definition(search, n, d, k):
    feats = random_feats(n, d)
    sq, index, farthest = by_definition(feats, k)
    found = SEARCHES[search](feats, feats.square().sum(1), k, 50)
    assert torch.equal(found[1], index) or d == 1
    torch.testing.assert_close(found[0], sq, atol=2e-6, rtol=0)
    torch.testing.assert_close(found[2], farthest, atol=2e-6, rtol=0)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_image_itself_comes_first_before_its_doubles(search):
    feats = random_feats(1, 40).repeat(70, 1)
    sq, index, _ = SEARCHES[search](feats, feats.square().sum(1), 4, 32)
    assert index[:, 0].tolist() == list(range(70))
    assert (sq[:, 0] == 0).all()
    assert (sq < 1e-6).all()
    assert (sq >= 0).all()


def test_public_search_takes_half_precision_and_zero_rows():
    feats = torch.cat([torch.zeros(3, 8), random_feats(50, 8)]).half()
    sq, index = nearest_neighbours(feats, 9, block=16)
    wanted_sq, wanted_index, wanted_farthest = by_definition(feats.float(), 9)
    assert sq.dtype == torch.float32
    assert index.dtype == torch.int64
    assert torch.equal(index[:3], wanted_index[:3])  # zero rows have one another, in order, then unit rows
    torch.testing.assert_close(sq, wanted_sq, atol=2e-6, rtol=0)
    torch.testing.assert_close(neighbours_and_farthest(feats, 9)[2], wanted_farthest, atol=2e-6, rtol=0)


def test_distances_of_single_pairs_compiled_and_by_torch():
    feats = random_feats(50, 37)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 50, (2, 200))
    x = feats.double().numpy()
    expected = ((x[first] - x[second]) ** 2).sum(1)
    compiled = np.empty(200, np.float32)
    kernels.pair_distances(0, 120, feats.numpy(), first, second, compiled)
    kernels.pair_distances(120, 200, feats.numpy(), first, second, compiled)
    np.testing.assert_allclose(compiled, expected, atol=1e-6)
    np.testing.assert_allclose(neighbours._pair_distances(feats, first, second, chunk=64), expected, atol=1e-6)


def test_broken_rows_are_counted_and_the_first_is_named():
    feats = random_feats(40, 4)
    feats[7, 2] = torch.nan
    feats[31] = torch.inf
    with pytest.raises(ValueError, match=r"2 of 40 rows hold NaN or infinity, the first is row 7; all must be finite"):
        nearest_neighbours(feats, 3)


@pytest.mark.parametrize("k", [0, 41])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"k is {k}; it must lie in 1\.\.40, the number of images"):
        nearest_neighbours(random_feats(40, 4), k)


def test_reduced_precision_of_training_does_not_reach_the_search():
    feats = random_feats(300, 256)
    expected = nearest_neighbours(feats, 20)
    kept = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = nearest_neighbours(feats, 20)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(kept)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_memory_stays_far_below_all_pairs():
    """All pairs of the larger sets would take 324 MB and, with their keys, more than 400 MB."""
    pytest.importorskip("resource")
    program = """
        import resource, torch
        from fastreid_uns.pseudo_labels import kernels, neighbours
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def run(search, n, block):
            feats = torch.nn.functional.normalize(torch.randn(n, 8))
            search(feats, feats.square().sum(1), 10, block)
        run(neighbours._search_each_pair_once, 1000, 1024)
        run(neighbours._search_by_rows, 1000, 256)
        before = peak()
        run(neighbours._search_each_pair_once, 9000, 1024)
        run(neighbours._search_by_rows, 4500, 256)
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    unit = 1024 if sys.platform == "darwin" else 1  # bytes there, kilobytes elsewhere
    assert float(done.stdout) / unit < 100
