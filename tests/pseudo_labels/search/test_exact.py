from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.pseudo_labels import jaccard_kernels
from fastreid_uns.pseudo_labels.search import candidates, exact
from fastreid_uns.pseudo_labels.search.candidates import CoarseFeatures, search_by_candidates
from fastreid_uns.pseudo_labels.search.exact import nearest_neighbours, nearest_of_others, neighbours_and_farthest
from fastreid_uns.pseudo_labels.search.gpu import RoundedFeatures, pair_distances, search_by_rows, triton_works
from fastreid_uns.utils import sharing
from fastreid_uns.utils.compiled import Workers
from fastreid_uns.utils.precision import full_precision

SEARCHES = {
    "8 bits": partial(search_by_candidates, int8=True),
    "float32": partial(search_by_candidates, farthest=True),
    "16 bits": search_by_rows,
}


def random_feats(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def grid_feats(n: int, d: int = 3) -> torch.Tensor:
    """Multiples of a quarter: many doubles and ties, and every product is exact in float32."""
    return torch.randint(-1, 2, (n, d), generator=torch.Generator().manual_seed(n)) / 4


def alike_feats(n: int, d: int = 24, spread: float = 1e-3) -> torch.Tensor:
    """Rows that share all but a thousandth, as those of an untrained network do."""
    return F.normalize(random_feats(1, d, 1) + spread * random_feats(n, d))


def by_definition(feats: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squared distances by differences, in float64, rounded, sorted by (not itself, distance, index)."""
    x = feats.double().numpy()
    sq = np.stack([((x - row) ** 2).sum(1) for row in x]).astype(np.float32)
    index = np.stack([np.lexsort((np.arange(len(x)), row, np.arange(len(x)) != i))[:k] for i, row in enumerate(sq)])
    near = np.take_along_axis(sq, index, 1)
    return torch.from_numpy(near), torch.from_numpy(index), torch.from_numpy(sq.max(1))


@pytest.mark.parametrize("block", [7, 64, 300])
@pytest.mark.parametrize("search", SEARCHES)
def test_ties_go_to_the_lower_index_whatever_the_block(search, block):
    feats = torch.cat([grid_feats(66), -grid_feats(66)])  # less their mean, which is zero, they are the same
    sq, index, _ = by_definition(feats, 30)
    found = SEARCHES[search](feats, 30, block)
    assert torch.equal(found[0], sq)
    assert torch.equal(found[1], index)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(("n", "d", "k"), [(157, 33, 30), (64, 16, 64), (5, 1, 1), (2, 3, 2), (1, 4, 1), (700, 8, 30)])
def test_equals_the_definition(search, n, d, k):
    feats = random_feats(n, d)
    sq, index, _ = by_definition(feats, k)
    found = SEARCHES[search](feats, k, 50)
    assert torch.equal(found[0], sq)
    assert torch.equal(found[1], index)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize(
    "feats",
    [alike_feats(900, 64, 0.003), alike_feats(900, 64), 1000 + 20 * random_feats(300, 32)],
    ids=["near", "nearer", "afar"],
)
def test_images_that_are_far_from_the_origin_and_near_each_other(search, feats):
    sq, index, _ = by_definition(feats, 20)
    found = SEARCHES[search](feats, 20, 256)
    assert torch.equal(found[0], sq)
    assert torch.equal(found[1], index)


def test_the_farthest_image():
    feats = random_feats(157, 33)
    found = SEARCHES["float32"](feats, 5, 50)[2]
    torch.testing.assert_close(found, by_definition(feats, 5)[2], atol=2e-6, rtol=0)


@pytest.mark.parametrize("search", SEARCHES)
def test_the_image_itself_comes_first_before_its_doubles(search):
    feats = random_feats(1, 40).repeat(70, 1)
    sq, index = SEARCHES[search](feats, 4, 32)[:2]
    assert index[:, 0].tolist() == list(range(70))
    assert index[:4].tolist() == [[0, 1, 2, 3], [1, 0, 2, 3], [2, 0, 1, 3], [3, 0, 1, 2]]
    assert (index[4:, 1:] == torch.arange(3)).all()
    assert (sq == 0).all()


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize(
    "feats",
    [
        pytest.param(torch.cat([random_feats(1, 6).repeat(400, 1), random_feats(300, 6)]), id="doubles"),
        pytest.param(torch.cat([torch.zeros(320, 6), random_feats(80, 6)]), id="zero rows"),
        pytest.param(alike_feats(500), id="collapsed"),
        pytest.param(random_feats(500, 512), id="equally far apart"),
        pytest.param(random_feats(500, 8) * torch.logspace(-3, 2, 500)[:, None], id="of all lengths"),
        pytest.param(random_feats(400, 12).half().float(), id="half precision"),
        pytest.param(torch.nn.functional.one_hot(torch.arange(300) % 150, 200).float(), id="one-hot"),
    ],
)
def test_any_precision_of_the_products_gives_the_same_neighbours(feats, int8):
    sq, index, _ = by_definition(feats, 10)
    found = search_by_candidates(feats, 10, 128, int8=int8)
    assert torch.equal(found[0], sq)
    assert torch.equal(found[1], index)


@pytest.mark.parametrize("int8", [True, False])
@pytest.mark.parametrize("feats", [random_feats(300, 100), alike_feats(300), 50 * random_feats(300, 7)])
def test_no_estimate_is_farther_off_than_the_bound(feats, int8):
    coarse = CoarseFeatures(feats, int8=int8)
    part = coarse.part(slice(None))
    products = coarse.product(part, part, coarse.memory(300 * 300)).astype(np.float64)
    norms, scales = coarse.norms.astype(np.float64), coarse.scales.astype(np.float64)
    estimate = norms[:, None] + norms - 2 * scales[:, None] * scales * products
    x = feats.double().numpy()
    off = np.abs(estimate - ((x[:, None] - x) ** 2).sum(2))
    assert (off <= coarse.errors[:, None]).all()
    assert (coarse.errors < 0.2 * np.square(x).sum(1).mean()).all()


def test_a_collapse_to_few_points_is_told(caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    monkeypatch.setattr(candidates, "_MANY", 140)
    nearest_neighbours(random_feats(600, 16), 5)
    assert "near each other" not in caplog.text
    points = random_feats(2, 16).repeat_interleave(300, 0)
    nearest_neighbours(points + 1e-6 * random_feats(600, 16), 5)
    assert re.search(r"600 images are so near each other that 1[45]\d of them were measured for each", caplog.text)


@pytest.mark.parametrize("side", [64, 250, 700])
@pytest.mark.parametrize("groups", [np.zeros(0, np.int64), np.arange(700) % 3], ids=["all", "other groups"])
def test_limits_hold_the_nearest_and_little_more(groups, side):
    feats, k = random_feats(700, 24), 5
    coarse = CoarseFeatures(feats, int8=True)
    with Workers() as workers:
        limits = candidates._limits(candidates._Blocks(coarse, groups, workers, side), 700, k)
    sq = torch.cdist(feats.double(), feats.double()).square().numpy()
    apart = groups if len(groups) else np.arange(700)
    sq[apart == apart[:, None]] = np.inf
    sq.sort(axis=1)
    assert (sq[:, k - 1] <= limits - coarse.errors).all()
    assert (limits <= sq[:, 2 * k] + 3 * coarse.errors).mean() > 0.95


@pytest.mark.parametrize("blocks", [1, 2, 3, 8, 13])
def test_each_pair_of_blocks_meets_once_and_no_block_is_in_two_places(blocks):
    rounds = [candidates._round(turn, blocks) for turn in range(blocks)]
    met = [frozenset(pair) for pairs in rounds for pair in pairs]
    assert len(met) == len(set(met)) == blocks * (blocks + 1) // 2
    for pairs in rounds:
        busy = [block for pair in pairs for block in set(pair)]
        assert len(busy) == len(set(busy))


@pytest.mark.parametrize(("blocks", "world"), [(3, 2), (8, 2), (11, 3), (32, 2), (32, 3), (33, 2), (64, 4)])
def test_each_process_gets_as_many_pairs_of_blocks_and_of_each_block(blocks, world, monkeypatch):
    monkeypatch.setattr(sharing, "_shared", True)
    monkeypatch.setattr(sharing.comm, "world", lambda: world)
    stages = candidates._stages(blocks)
    assert [turn for rounds in stages for turn in rounds] == list(range(blocks))
    owned = []
    for rank in range(world):
        monkeypatch.setattr(sharing.comm, "rank", lambda rank=rank: rank)
        owned.append([candidates._own(candidates._round(turn, blocks), turn, blocks) for turn in range(blocks)])
    for rounds in stages[:-1]:
        counts = [sum(bool(pairs[turn]) for turn in rounds) for pairs in owned]
        assert len(set(counts)) == 1
    every = [[pair for pairs in own for pair in pairs] for own in owned]
    assert len({pair for own in every for pair in own}) == sum(map(len, every)) == blocks * (blocks + 1) // 2
    assert max(map(len, every)) - min(map(len, every)) <= 1 + blocks % world
    met = [[sum(block in pair for pair in pairs) for block in range(blocks)] for pairs in every]
    assert np.max(met) - np.min(met) <= 2


def test_joined_lists_are_the_smallest_of_both_without_doubles():
    from fastreid_uns.pseudo_labels.search import kernels

    draw = np.random.default_rng(0)
    for length in (1, 2, 7):
        shared = np.arange(5)
        one, two = (
            np.sort(
                [draw.choice(np.r_[shared, draw.choice(900, 40, replace=False) + 5], length, False) for _ in range(50)]
            )
            for _ in range(2)
        )
        joined = one.copy()
        kernels.join_lists(two, joined)
        expected = [np.union1d(a, b)[:length] for a, b in zip(one, two, strict=True)]
        assert np.array_equal(joined, expected)


@pytest.mark.parametrize("search", ["8 bits", "float32"])
def test_the_number_of_threads_does_not_show_and_is_left_as_it_was(search):
    feats, kept = random_feats(1500, 20), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = SEARCHES[search](feats, 12, 100)
        torch.set_num_threads(5)
        shared = SEARCHES[search](feats, 12, 100)
        assert torch.get_num_threads() == 5
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


@pytest.mark.parametrize("search", SEARCHES)
def test_inference_mode_reaches_all_threads(search):
    feats = random_feats(700, 20)
    expected = SEARCHES[search](feats, 12, 100)
    with torch.inference_mode():
        found = SEARCHES[search](feats.clone(), 12, 100)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_failure_leaves_the_number_of_threads_as_it_was(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(CoarseFeatures, "product", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search_by_candidates(random_feats(500, 20), 12, 100, int8=False)
    assert torch.get_num_threads() == threads


def test_the_sample_tells_how_much_8_bits_leave_to_be_measured():
    """A peak in each row leaves the rest of it no bits."""
    peaked = torch.eye(600) + 0.05 * random_feats(600, 600)
    assert CoarseFeatures(peaked, int8=True).share_to_measure(10) > 0.9
    assert CoarseFeatures(peaked, int8=False).share_to_measure(10) < 0.1


def test_eight_bits_are_chosen_where_they_are_faster_and_suffice(monkeypatch):
    monkeypatch.setattr(candidates, "_SMALL", 300)
    monkeypatch.setattr(candidates, "_MEASURED", 0.5)
    near = torch.cat([random_feats(40, 64)] * 8) + 0.1 * random_feats(320, 64)
    for pays, feats, expected in (
        (True, near, True),
        (False, near, False),
        (True, torch.eye(320) + 0.05 * random_feats(320, 320), False),
    ):
        monkeypatch.setattr(candidates, "int8_pays", lambda d, threads, pays=pays: pays)
        assert candidates._chosen(feats, 5).int8 is expected
    assert not candidates._chosen(near[:299], 5).int8


@pytest.mark.parametrize(
    ("product", "faster", "pays"),
    [
        pytest.param(lambda a, b: a.int() @ b.int(), 0, True, id="exact"),
        pytest.param(lambda a, b: a.int() @ b.int(), 1e9, False, id="slow"),
        pytest.param(lambda a, b: (a.int() @ b.int()).clamp(max=127**2 * 63), 0, False, id="overflows"),
        pytest.param(None, 0, False, id="missing"),
    ],
)
def test_products_of_8_bits_must_be_exact_and_fast(product, faster, pays, monkeypatch):
    def multiply(a, b):
        if product is None:
            raise RuntimeError("no kernel")
        return product(a, b)

    monkeypatch.setattr(torch, "_int_mm", multiply)
    monkeypatch.setattr(candidates, "_FASTER", faster)
    assert candidates.int8_pays.__wrapped__(64, 1, size=16) is pays


def test_rows_too_long_for_32_bits_are_multiplied_in_float32():
    assert not candidates.int8_pays(133_145, 1)
    assert 133_144 * 127**2 < 2**31 <= 133_145 * 127**2


def test_public_search_takes_half_precision_and_zero_rows():
    feats = torch.cat([torch.zeros(3, 8), random_feats(50, 8)]).half()
    sq, index = nearest_neighbours(feats, 9, block=16)
    wanted_sq, wanted_index, wanted_farthest = by_definition(feats.float(), 9)
    assert sq.dtype == torch.float32
    assert index.dtype == torch.int64
    assert torch.equal(sq, wanted_sq)
    assert torch.equal(index, wanted_index)
    torch.testing.assert_close(neighbours_and_farthest(feats, 9)[2], wanted_farthest, atol=2e-6, rtol=0)


def test_distances_of_single_pairs_compiled_and_by_torch():
    feats = random_feats(50, 37)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 50, (2, 200))
    x = feats.double().numpy()
    expected = ((x[first] - x[second]) ** 2).sum(1)
    compiled = np.empty(200, np.float32)
    jaccard_kernels.pair_distances(0, 120, feats.numpy(), first, second, compiled)
    jaccard_kernels.pair_distances(120, 200, feats.numpy(), first, second, compiled)
    assert (compiled == expected.astype(np.float32)).all()
    pairs = torch.from_numpy(first), torch.from_numpy(second)
    assert torch.equal(pair_distances(feats, *pairs), torch.from_numpy(compiled))


def test_broken_rows_are_counted_and_the_first_is_named():
    feats = random_feats(40, 4)
    feats[7, 2] = torch.nan
    feats[31] = torch.inf
    with pytest.raises(ValueError, match=r"1 of 3 rows.*and their squares too"):
        nearest_neighbours(torch.tensor([[1.0], [1e25], [2.0]]), 2)
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
    """All pairs of the larger set would take 324 MB."""
    pytest.importorskip("resource")
    program = """
        import resource, torch
        from fastreid_uns.pseudo_labels.search import candidates
        from fastreid_uns.pseudo_labels.search.gpu import search_by_rows
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def run(n):
            feats = torch.nn.functional.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(0)))
            candidates.search_by_candidates(feats, 10, 1024, int8=True)
            candidates.search_by_candidates(feats, 10, 1024, farthest=True)
            search_by_rows(feats[: n // 3], 10, 256)
        run(2048)
        before = peak()
        run(9000)
        print(peak() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    unit = 1024 if sys.platform == "darwin" else 1  # bytes there, kilobytes elsewhere
    assert float(done.stdout) / unit < 100


def on(device: torch.device, search: Callable, *args: object) -> list[torch.Tensor]:
    """What a public search finds on a GPU; on a CPU what it would: the same operations on tensors of the CPU."""
    if device.type == "cuda":
        found = search(*(part.to(device) if isinstance(part, torch.Tensor) else part for part in args))
    else:
        feats, *groups, k = args
        with full_precision(device):
            found = exact._by_rows(feats, k, 2048, *groups)
    return [part.cpu() for part in found]


@pytest.mark.parametrize(
    ("feats", "k"),
    [
        pytest.param(random_feats(2500, 256), 30, id="random"),
        pytest.param(random_feats(1177, 2048), 30, id="long"),
        pytest.param(grid_feats(3000, 5), 30, id="grid"),
        pytest.param(grid_feats(1000, 2), 1000, id="all of a grid"),
        pytest.param(alike_feats(2500), 30, id="alike"),
        pytest.param(random_feats(40, 64).repeat_interleave(60, 0), 30, id="doubles"),
        pytest.param(random_feats(3, 64).repeat(700, 1), 690, id="doubles everywhere"),
        pytest.param(random_feats(8, 32, 1).repeat_interleave(300, 0) + 1e-5 * random_feats(2400, 32), 30, id="clumps"),
        pytest.param(1000 + 20 * random_feats(2000, 32), 30, id="afar"),
        pytest.param(random_feats(257, 24), 256, id="nearly all"),
        pytest.param(random_feats(2049, 3), 2, id="one more than a block"),
    ],
)
def test_a_gpu_finds_what_the_cpu_finds(feats, k, device):
    sq, index = nearest_neighbours(feats, k)
    found = on(device, nearest_neighbours, feats, k)
    assert torch.equal(found[1], index)
    assert torch.equal(found[0], sq)


@pytest.mark.parametrize("feats", [random_feats(1500, 40), grid_feats(900, 3)], ids=["random", "grid"])
def test_a_gpu_finds_others_as_the_cpu_does(feats, device):
    groups = torch.arange(len(feats)) % 7
    groups[groups > 5] = -1
    sq, index = nearest_of_others(feats, groups, 20)
    found = on(device, nearest_of_others, feats, groups, 20)
    assert torch.equal(found[1], index)
    assert torch.equal(found[0], sq)


@pytest.mark.gpu
def test_a_gpu_finds_the_farthest():
    feats = random_feats(1500, 40)
    far, found = (neighbours_and_farthest(rows, 5)[2] for rows in (feats, feats.cuda()))
    torch.testing.assert_close(found.cpu(), far, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_product_is_farther_off_than_the_bound_where_a_tensor_core_loses_the_most(dtype, device):
    """In the sums of large features of one sign."""
    feats = torch.cat([random_feats(300, 2048).abs(), -random_feats(200, 2048).abs()]).to(device)
    coarse = RoundedFeatures(feats, dtype)
    found = coarse.estimates(range(500), slice(0, 500)).double() + coarse.norms[:, None]
    true = torch.stack([(feats.double() - row.double()).square().sum(1) for row in feats]) * coarse.unit
    assert ((found - true).abs() <= coarse.errors[:, None]).all()


@pytest.mark.gpu
def test_the_loop_of_triton_measures_on_a_gpu_what_torch_does():
    pytest.importorskip("triton")
    if "CC" not in os.environ and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("Triton needs a C compiler")
    assert triton_works()
    for d in (1, 37, 256, 1500):
        feats, pairs = random_feats(40, d), torch.randint(0, 40, (2, 300), generator=torch.Generator().manual_seed(d))
        found = pair_distances(feats.cuda(), *pairs.cuda())
        assert torch.equal(found.cpu(), pair_distances(feats, *pairs))
