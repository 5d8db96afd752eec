from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.evaluation.rerank import camera_rerank, rerank, rerank_blocks

sys.path.insert(0, str(Path(__file__).parents[1] / "pseudo_labels"))
import dense_oracle

GOLDEN = Path(__file__).parents[1] / "golden"


def task(queries: int, images: int, d: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(queries)
    return tuple(F.normalize(torch.randn(n, d, generator=generator)) for n in (queries, images))


def test_distances_of_the_official_code():
    case = np.load(GOLDEN / "spcl_eval.npz")
    query, gallery = (torch.from_numpy(case[f"{side}_features"]) for side in ("query", "gallery"))
    found = rerank(query, gallery, k1=20, k2=6, weight=0.3)
    np.testing.assert_allclose(found.numpy(), case["reranked"], atol=5e-6, rtol=0)


@pytest.mark.parametrize(
    ("queries", "images", "k1", "k2", "weight"),
    [(13, 91, 20, 6, 0.3), (7, 50, 5, 1, 0.5), (1, 60, 3, 2, 0.0), (30, 9, 10, 4, 1.0), (2, 40, 1, 1, 0.3)],
)
def test_equals_the_dense_form(queries, images, k1, k2, weight):
    query, gallery = task(queries, images)
    expected = dense_oracle.reranked(query.double().numpy(), gallery.double().numpy(), k1, k2, weight)
    found = rerank(query, gallery, k1=k1, k2=k2, weight=weight)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, atol=3e-6, rtol=0)


def test_fewer_images_than_k1_uses_all_of_them():
    query, gallery = task(3, 8)
    expected = dense_oracle.reranked(query.double().numpy(), gallery.double().numpy(), 20, 6, 0.3)
    np.testing.assert_allclose(rerank(query, gallery).numpy(), expected, atol=3e-6, rtol=0)


def test_blocks_are_rows_of_the_whole_in_order():
    query, gallery = task(23, 70)
    blocks = list(rerank_blocks(query, gallery, rows=10))
    assert [len(block) for block in blocks] == [10, 10, 3]
    torch.testing.assert_close(torch.cat(blocks), rerank(query, gallery), atol=1e-6, rtol=0)


def test_half_precision_counts_as_its_float32_values():
    query, gallery = (side.half() for side in task(9, 60))
    torch.testing.assert_close(rerank(query, gallery), rerank(query.float(), gallery.float()))


def test_collapsed_features_give_finite_distances():
    found = rerank(torch.ones(4, 5), torch.ones(30, 5))
    assert found.isfinite().all()
    assert (found - found[0, 0]).abs().max() < 1


def test_broken_features_are_refused_counting_queries_first():
    query, gallery = task(5, 20)
    gallery[2] = torch.nan
    with pytest.raises(ValueError, match=r"1 of 25 rows hold NaN or infinity, the first is row 7"):
        rerank(query, gallery)


@pytest.mark.parametrize("wrong", [{"k1": 0}, {"k2": 0}, {"weight": -0.1}, {"weight": 1.1}])
def test_parameters_out_of_range(wrong):
    given = {"k1": 20, "k2": 6, "weight": 0.3, **wrong}
    message = "rerank: k1 is {k1}, k2 is {k2} and weight is {weight}; k1 and k2 must be at least 1 and weight 0..1"
    with pytest.raises(ValueError, match=message.format(**given).replace(".", r"\.")):
        rerank(*task(5, 20), **wrong)


@pytest.mark.parametrize("sizes", [(0, 20), (5, 0)])
def test_an_empty_side(sizes):
    with pytest.raises(
        ValueError, match=rf"{sizes[0]} query and {sizes[1]} gallery images; there must be some of both"
    ):
        rerank(*task(*sizes))


@pytest.mark.parametrize("name", ["caj_rerank_01", "caj_rerank_02"])
def test_camera_aware_distances_of_the_official_code(name):
    case = np.load(GOLDEN / f"{name}.npz")
    feats, cameras = torch.from_numpy(case["in_features"]).float(), torch.from_numpy(case["in_cameras"]).long()
    queries = int(case["in_num_query"])
    keys = {name: int(case[f"par_{name}"]) for name in ("k1_intra", "k1_inter", "k2_intra", "k2_inter")}
    found = camera_rerank(feats[:queries], feats[queries:], cameras, weight=float(case["par_lambda"]), **keys)
    np.testing.assert_allclose(found.numpy(), case["out_reranked"], atol=5e-6, rtol=0)
