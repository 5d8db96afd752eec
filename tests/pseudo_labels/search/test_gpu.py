"""The search of a GPU, on tensors of the CPU, against float64; the products of 16 bits are the same numbers there."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.pseudo_labels.search import candidates, gpu
from fastreid_uns.pseudo_labels.search.gpu import RoundedFeatures, farthest_by_rows, search_by_rows

PRODUCTS = [torch.float16, torch.bfloat16]


def random_feats(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def ladder(n: int = 60) -> torch.Tensor:
    """Two ladders around 1 and -1, whose steps are finer than 8 or 11 bits: all rungs are rounded to the same."""
    rungs = 1 + torch.arange(n) * 2.0**-18
    return torch.cat([rungs, -rungs])[:, None]


def by_definition(feats: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = feats.double().numpy()
    sq = np.stack([((x - row) ** 2).sum(1) for row in x]).astype(np.float32)
    index = np.stack([np.lexsort((np.arange(len(x)), row, np.arange(len(x)) != i))[:k] for i, row in enumerate(sq)])
    return torch.from_numpy(np.take_along_axis(sq, index, 1)), torch.from_numpy(index)


@pytest.fixture
def again(monkeypatch) -> list[int]:
    """How many images each call searched again."""
    counts, search = [], gpu.search_again

    def counted(feats, images, *args):
        counts.append(len(images))
        return search(feats, images, *args)

    monkeypatch.setattr(gpu, "search_again", counted)
    return counts


CASES = {
    "no structure": random_feats(700, 64),
    "equal distances": torch.randint(-1, 2, (600, 5), generator=torch.Generator().manual_seed(1)) / 4,
    "doubles": torch.cat([random_feats(1, 6).repeat(150, 1), random_feats(300, 6)]),
    "all the same": torch.full((200, 3), 0.3),
    "zero rows": torch.cat([torch.zeros(120, 6), random_feats(80, 6)]),
    "one clump": F.normalize(random_feats(1, 24, 1) + 1e-3 * random_feats(500, 24)),
    "tight clumps": random_feats(4, 16, 3).repeat_interleave(100, 0) + 1e-5 * random_feats(400, 16),
    "far from the origin": 1000 + 20 * random_feats(300, 32),
    "of all lengths": random_feats(500, 8) * torch.logspace(-4, 3, 500)[:, None],
    "huge": 1e15 * random_feats(300, 8),
    "tiny": 1e-18 * random_feats(300, 8),
    "half precision": random_feats(400, 12).half().float(),
    "ladder": ladder(),
}


@pytest.mark.parametrize("products", PRODUCTS, ids=str)
@pytest.mark.parametrize("feats", CASES.values(), ids=CASES)
def test_equals_the_definition(feats, products):
    sq, index = by_definition(feats, 30)
    found = search_by_rows(feats, 30, 70, products=products)
    assert torch.equal(found[1], index)
    assert torch.equal(found[0], sq)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (5, 1), (64, 64), (129, 128), (300, 290)])
def test_any_number_of_neighbours(n, k):
    feats = random_feats(n, 9)
    sq, index = by_definition(feats, k)
    found = search_by_rows(feats, k, 50)
    assert torch.equal(found[1], index)
    assert torch.equal(found[0], sq)


@pytest.mark.parametrize("block", [1, 60, 2048])
@pytest.mark.parametrize("columns", [128, 512])
def test_columns_in_several_blocks_and_groups_of_columns(block, columns, monkeypatch):
    monkeypatch.setattr(gpu, "_COLUMNS", max(1, columns // block))
    monkeypatch.setattr(gpu, "_ALIGN", columns if block == 60 else 128)
    monkeypatch.setattr(gpu, "_SPARE", 3)
    monkeypatch.setattr(gpu, "_GROUP", 8)
    monkeypatch.setattr(gpu, "_AGAIN", 100)
    feats = torch.cat([random_feats(150, 12).repeat(2, 1), random_feats(231, 12, 2)])
    sq, index = by_definition(feats, 6)
    found = search_by_rows(feats, 6, block)
    assert torch.equal(found[1], index)
    assert torch.equal(found[0], sq)


@pytest.mark.parametrize("count", [1, 4, 7, 40, 64, 200])
def test_the_least_of_each_row_and_of_those_left_out(count):
    values = torch.randn(9, 256, generator=torch.Generator().manual_seed(count))
    least, columns, left = gpu._least(values, count)
    ordered = values.sort(1).values
    assert torch.equal(least, ordered[:, :count])
    assert torch.equal(values.gather(1, columns), least)
    assert (left <= ordered[:, count]).all()
    assert (left >= ordered[:, count - 1]).all()


@pytest.mark.parametrize("products", PRODUCTS, ids=str)
@pytest.mark.parametrize("feats", CASES.values(), ids=CASES)
def test_no_estimate_is_farther_off_than_the_bound(feats, products):
    coarse = RoundedFeatures(feats, products)
    found = coarse.estimates(range(len(feats)), slice(0, len(feats))).double() + coarse.norms[:, None]
    x = feats.double()
    true = (x[:, None] - x).square().sum(2) * coarse.unit
    assert ((found - true).abs() <= coarse.errors[:, None]).all()
    if len(feats) > 1 and feats.std() > 0:
        relative = 0.05 if products == torch.bfloat16 else 0.01
        assert float(coarse.errors.median()) < relative * 4 * float(coarse.norms.max())


def test_images_that_pad_are_infinitely_far():
    coarse = RoundedFeatures(random_feats(5, 3), torch.float16)
    assert coarse.estimates(range(5), slice(5, None)).isposinf().all()
    assert coarse.estimates(range(5), slice(0, 5)).isfinite().all()


@pytest.mark.parametrize("products", PRODUCTS, ids=str)
def test_an_image_that_products_can_tell_apart_is_not_searched_again(products, again):
    search_by_rows(random_feats(900, 32), 10, 128, products=products)
    assert again == []


@pytest.mark.parametrize("products", PRODUCTS, ids=str)
def test_without_certificate_an_image_is_searched_again(products, again):
    """To the products, the lowest rung of a ladder is the nearest to all of its rungs."""
    feats = ladder()
    sq, index = by_definition(feats, 4)
    coarse = RoundedFeatures(feats, products)
    keys, certain = gpu._from_candidates(feats, coarse, range(120), 4, 120, None)
    wrong = ((keys & 0xFFFFFFFF) != index).any(1)
    assert 20 < int(wrong.sum()) < 100
    assert not bool((wrong & certain).any())
    found = search_by_rows(feats, 4, 120, products=products)
    assert again == [int((~certain).sum())]
    assert torch.equal(found[1], index)
    assert torch.equal(found[0], sq)


def test_what_is_certain_is_right_and_needs_the_bound(monkeypatch):
    """Half of the rows are told by the products, the others are rungs; a bound of zero takes wrong ones for certain."""
    feats = F.pad(ladder(), (0, 7))
    feats = torch.cat([feats, F.pad(2 * random_feats(120, 7), (1, 0))])
    index = by_definition(feats, 4)[1]

    def judged() -> tuple[torch.Tensor, torch.Tensor]:
        keys, certain = gpu._from_candidates(feats, coarse, range(240), 4, 240, None)
        return ((keys & 0xFFFFFFFF) == index).all(1), certain

    coarse = RoundedFeatures(feats, torch.float16)
    right, certain = judged()
    assert bool(right[certain].all())
    assert int(certain[120:].sum()) == 120
    assert int(certain[:120].sum()) == 0
    coarse.errors.zero_()
    right, certain = judged()
    assert not bool(right[certain].all())


@pytest.mark.parametrize("name", ["equal distances", "tight clumps", "doubles"])
def test_all_images_searched_again(name):
    feats = CASES[name]
    sq, index = by_definition(feats, 8)
    images = torch.arange(len(feats)).flip(0)
    keys = gpu.keys_of(torch.full((len(feats), 8), 1e9), images[:, None].expand(-1, 8))
    keys[:, 0] = images
    found = gpu.search_again(feats, images, keys)
    assert torch.equal(found & 0xFFFFFFFF, index.flip(0))
    assert torch.equal(gpu.distance_of(found), sq.flip(0))


def test_a_list_full_of_doubles_ends_the_search_of_an_image(monkeypatch):
    monkeypatch.setattr(gpu, "_AGAIN", 50)
    measured, distances = [], gpu.pair_distances
    monkeypatch.setattr(gpu, "pair_distances", lambda *args: measured.append(len(args[1])) or distances(*args))
    feats = torch.zeros(400, 3)
    keys = torch.arange(400)[:, None].repeat(1, 5)
    found = gpu.search_again(feats, torch.arange(400), keys)
    assert found[10].tolist() == [10, 0, 1, 2, 3]
    assert sum(measured) == 400 * 50 - 50  # of the first columns only


def test_a_collapse_to_few_points_is_told(caplog, monkeypatch):
    monkeypatch.setattr(candidates, "_MANY", 50)
    search_by_rows(random_feats(2, 16).repeat_interleave(100, 0) + 1e-9 * random_feats(200, 16), 5, 100)
    assert "200 images are so near each other that" in caplog.text


@pytest.mark.parametrize("rows", [range(0, 90), range(90, 211), range(210, 211), range(7, 7)])
def test_some_images_only(rows):
    feats = torch.cat([random_feats(101, 10), ladder(55).expand(-1, 10)])
    whole, part = search_by_rows(feats, 7, 40), search_by_rows(feats, 7, 40, rows=rows)
    assert all(torch.equal(a[rows.start : rows.stop], b) for a, b in zip(whole, part, strict=True))


def test_the_farthest_image():
    feats = random_feats(157, 33)
    x = feats.double()
    expected = (x[:, None] - x).square().sum(2).amax(1).float()
    torch.testing.assert_close(farthest_by_rows(feats, 16), expected, atol=2e-6, rtol=0)


def test_sums_are_those_of_float32_whatever_the_user_allows():
    place = torch.backends.cuda.matmul
    if not hasattr(place, "allow_fp16_accumulation"):
        pytest.skip("this torch has no such choice")
    kept = place.allow_fp16_accumulation
    place.allow_fp16_accumulation = True
    try:
        with gpu._sums_in_float32():
            assert place.allow_fp16_accumulation is False
        assert place.allow_fp16_accumulation is True
    finally:
        place.allow_fp16_accumulation = kept


def test_the_loop_of_triton_measures_what_torch_does():
    """By Triton's own interpreter, which needs no GPU."""
    pytest.importorskip("triton")
    program = """
        import torch
        from fastreid_uns.pseudo_labels.search import gpu, triton_kernels
        for d in (1, 37, 256, 1500):
            feats = torch.randn(20, d, generator=torch.Generator().manual_seed(d))
            first, second = torch.randint(0, 20, (2, 30), generator=torch.Generator().manual_seed(d))
            second[:3] = first[:3]
            expected = gpu.pair_distances(feats, first, second)
            assert torch.equal(triton_kernels.pair_distances(feats, first, second), expected)
        assert triton_kernels.pair_distances(feats, first[:0], second[:0]).shape == (0,)
        print("equal")
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "equal\n", done.stderr
