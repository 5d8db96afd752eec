from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix

from fastreid_uns.pseudo_labels import jaccard, jaccard_kernels
from fastreid_uns.pseudo_labels.jaccard import (
    encode,
    encoding_distance,
    jaccard_distance,
    reciprocal_encoding,
)
from fastreid_uns.pseudo_labels.search.exact import nearest_neighbours

sys.path.insert(0, str(Path(__file__).parent))
import dense_oracle

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [60, 200, 400]


def golden(n: int) -> tuple[dict[str, np.ndarray], torch.Tensor, int, int]:
    case = dict(np.load(GOLDEN / f"jaccard_n{n}.npz"))
    return case, torch.from_numpy(case["features"]), int(case["k1"]), int(case["k2"])


def dense(distance: csr_matrix) -> np.ndarray:
    """Absent pairs have distance 1; `toarray` would give 0."""
    result = np.ones(distance.shape, np.float32)
    pairs = distance.tocoo()
    result[pairs.row, pairs.col] = pairs.data
    return result


def random_feats(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("n", CASES)
def test_neighbours_and_reciprocal_sets_of_the_official_code(n):
    case, feats, k1, _ = golden(n)
    _, index = nearest_neighbours(feats, k1, block=64)
    assert (index.numpy() == case["neighbors"]).all()
    near = index.int().numpy()
    back = np.empty_like(near)
    jaccard_kernels.place_in_return(0, n, near, back)
    half = case["recip_half"].shape[1]
    for i in range(n):
        assert near[i, back[i] < k1].tolist() == [j for j in case["recip_k1"][i] if j >= 0]
        assert near[i, :half][back[i, :half] < half].tolist() == [j for j in case["recip_half"][i] if j >= 0]


def test_weights_of_the_official_code():
    case, feats, k1, k2 = golden(60)
    before, after = reciprocal_encoding(feats, k1, 1), reciprocal_encoding(feats, k1, k2)
    np.testing.assert_allclose(before.toarray() / 2**30, case["weights_before_expansion"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(after.toarray() / 2**30, case["weights_after_expansion"], atol=1e-6, rtol=0)
    assert ((before.toarray() > 0) == (case["weights_before_expansion"] > 0)).all()


@pytest.mark.parametrize("n", CASES)
def test_distance_of_the_official_code(n):
    case, feats, k1, k2 = golden(n)
    np.testing.assert_allclose(dense(jaccard_distance(feats, k1, k2)), case["dist"], atol=5e-6, rtol=0)
    if "dist_k2_1" in case:
        np.testing.assert_allclose(dense(jaccard_distance(feats, k1, 1)), case["dist_k2_1"], atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("n", "d", "k1", "k2"), [(61, 5, 7, 3), (101, 16, 30, 6), (257, 24, 25, 6), (33, 4, 2, 1), (50, 6, 12, 40)]
)
def test_equals_the_dense_form(n, d, k1, k2):
    feats = random_feats(n, d)
    expected = dense_oracle.jaccard(feats.double().numpy(), k1, k2)
    np.testing.assert_allclose(dense(jaccard_distance(feats, k1, k2)), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("n", [90, 151])
def test_equals_the_dense_form_with_doubles_ties_and_zero_rows(n):
    feats = torch.randint(-1, 2, (n, 4), generator=torch.Generator().manual_seed(n)) / 4  # exact in float32
    feats[5] = feats[40] = 0
    assert len(feats.unique(dim=0)) < n - 1
    expected = dense_oracle.jaccard(feats.double().numpy(), 20, 6)
    np.testing.assert_allclose(dense(jaccard_distance(feats, 20, 6)), expected, atol=2e-6, rtol=0)


def test_half_precision_counts_as_its_float32_values():
    feats = random_feats(80, 12).half()
    assert (jaccard_distance(feats, 10, 3) != jaccard_distance(feats.float(), 10, 3)).nnz == 0


def test_fewer_images_than_k1_uses_all_of_them_and_says_so():
    feats = random_feats(20, 8)
    with pytest.warns(UserWarning, match=r"k1 30 exceeds the 20 images there are; 20 neighbours are used\. Lower K1"):
        found = jaccard_distance(feats, 30, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaccard_distance(feats, 20, 6)
    expected = dense_oracle.jaccard(feats.double().numpy(), 30, 6)
    np.testing.assert_allclose(dense(found), expected, atol=2e-6, rtol=0)


def test_vectors_far_from_unit_length_stay_finite():
    feats = torch.cat([torch.zeros(5, 6), 100 * random_feats(40, 6)])
    found = jaccard_distance(feats, 8, 3)
    assert np.isfinite(found.data).all()
    assert (found.diagonal() == 0).all()


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.6, 0.9])
def test_a_limit_drops_pairs_and_changes_none(limit):
    feats = golden(200)[1]
    full, kept = jaccard_distance(feats, 20, 6), jaccard_distance(feats, 20, 6, max_distance=limit)
    wanted = dense(full)
    wanted[wanted > np.float32(limit)] = 1
    assert (dense(kept) == wanted).all()
    assert kept.nnz == (wanted < 1).sum()
    assert kept.nnz < full.nnz


def test_a_limit_drops_the_right_pairs_of_more_images_than_overlaps_have_places():
    n = jaccard_kernels._PLACES + 3000
    encoding = reciprocal_encoding(random_feats(n, 6), 8, 3)
    full, kept = encoding_distance(encoding), encoding_distance(encoding, max_distance=0.7)
    full.data[full.data > np.float32(0.7)] = -1
    full.data += 1  # a distance of 0 is an entry, too
    full.eliminate_zeros()
    full.data -= 1
    assert np.array_equal(full.indptr, kept.indptr)
    assert np.array_equal(full.indices, kept.indices)
    assert np.array_equal(full.data, kept.data)


@pytest.mark.parametrize("bits", [2, 5, 12, 22])
@pytest.mark.parametrize("limit", [0.0, 0.4, 0.8])
def test_the_bits_of_a_weight_in_the_lists_change_no_pair(bits, limit):
    feats = random_feats(300, 6).repeat_interleave(torch.arange(300) % 2 + 1, 0)  # with doubles
    encoding, n = reciprocal_encoding(feats, 10, 4), 450
    order = np.random.default_rng(0).permutation(n).astype(np.int32)
    entries = (order, encoding.indptr, encoding.indices, encoding.data)
    begin = np.concatenate([[0], np.cumsum(np.bincount(encoding.indices, minlength=n))])
    lists = np.empty(encoding.nnz, np.int32)
    for start, stop in ((0, 170), (170, n)):
        jaccard_kernels.lists_of_columns(start, stop, begin, *entries, bits, lists)
    sizes, found, distances = jaccard_kernels.near_rows(0, n, *entries, begin, lists, bits, np.float32(limit))
    row, col = order[np.repeat(np.arange(n), sizes)], order[found]
    full = dense(encoding_distance(encoding))[order][:, order]
    assert (np.repeat(np.arange(n), sizes) >= found).all()
    assert len(found) == (np.tril(full <= np.float32(limit))).sum()
    assert (dense(encoding_distance(encoding))[row, col] == distances).all()


def test_form_of_the_matrix():
    found = jaccard_distance(golden(200)[1], 20, 6)
    assert found.dtype == np.float32
    assert found.has_canonical_format
    assert (dense(found) == dense(found).T).all()
    assert found.has_sorted_indices
    stored = [i in found.indices[a:b] for i, (a, b) in enumerate(zip(found.indptr, found.indptr[1:], strict=False))]
    assert all(stored)  # zeros of the diagonal are kept
    assert (found.diagonal() == 0).all()
    assert (found.data * 2**20 == np.rint(found.data * 2**20)).all()
    assert found.data.min() >= 0
    assert found.data.max() < 1


def test_structural_ties_fall_on_their_exact_value():
    """Two rows of six weights of 1/6 that share four: 1 - (4/6) / (2 - 4/6) = 0.5, whatever the order of the sum."""
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(8)
        a, b = order[order < 6], order[order >= 2]
        data = np.full(12, round(2**30 / 6), np.int32)
        rows = csr_matrix((data, np.concatenate([a, b]), [0, 6, 12]), shape=(2, 8))
        assert dense(encoding_distance(rows)).tolist() == [[0, 0.5], [0.5, 0]]
        assert encoding_distance(rows, max_distance=0.5).nnz == 4


def test_rows_that_share_columns_are_visited_one_after_the_other():
    group = np.random.default_rng(0).permutation(np.repeat(np.arange(20), 5))
    together = csr_matrix((group[:, None] == group).astype(np.int32))
    order = jaccard._alike_together(together.indptr[:-1], together.indices, square=True)
    assert sorted(order.tolist()) == list(range(100))
    assert (np.diff(group[order]) != 0).sum() == 19


def test_distance_between_two_sets_of_rows_is_the_block_of_all_distances():
    encoding = reciprocal_encoding(random_feats(90, 8), 12, 4)
    full = dense(encoding_distance(encoding))
    part = dense(encoding_distance(encoding[30:50], encoding[10:70].T.tocsr()))
    np.testing.assert_allclose(part, full[30:50, 10:70], atol=1e-6, rtol=0)


def test_blocks_of_the_search_do_not_show():
    case, feats, k1, k2 = golden(400)
    for block in (33, 150, 512):
        encoding = encode(feats, *nearest_neighbours(feats, k1, block=block), k1, k2, lambda rows, distances: distances)
        np.testing.assert_allclose(dense(encoding_distance(encoding)), case["dist"], atol=5e-6, rtol=0)


@pytest.mark.parametrize("limit", [0.8, 1.0])
def test_thread_count_changes_no_bit(limit):
    feats = random_feats(300, 16)
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(jaccard_distance(feats, 15, 4, max_distance=limit))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert np.array_equal(found[0].indices, other.indices)
        assert np.array_equal(found[0].data, other.data)


@pytest.mark.parametrize(("k1", "k2"), [(1, 6), (30, 0)])
def test_k_out_of_range(k1, k2):
    with pytest.raises(ValueError, match=rf"k1 is {k1} and k2 is {k2}; k1 must be at least 2 and k2 at least 1"):
        jaccard_distance(random_feats(40, 4), k1, k2)
