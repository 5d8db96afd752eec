from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fastreid_uns.evaluation import retrieval
from fastreid_uns.evaluation.retrieval import Ranker, count_closer, distance_blocks, retrieve
from fastreid_uns.structures import Record, ReIDData

GOLDEN = Path(__file__).parents[1] / "golden" / "spcl_eval.npz"


def ranking_by_definition(row, identity, camera, gallery_identities, gallery_cameras, protocol):
    """Gallery positions in order of distance, without what the protocol leaves out."""
    order = sorted(range(len(row)), key=lambda g: (row[g], g))
    kept = []
    for g in order:
        own_camera = gallery_identities[g] == identity and gallery_cameras[g] == camera
        if gallery_identities[g] == -1 or (protocol == "cross_camera" and own_camera):
            continue
        kept.append(g)
    return kept


def metrics_by_definition(distances, query, cameras, gallery, gallery_cameras, protocol):
    precisions, penalties, firsts = [], [], []
    for row, identity, camera in zip(distances, query, cameras, strict=True):
        kept = ranking_by_definition(row, identity, camera, gallery, gallery_cameras, protocol)
        hits = [rank for rank, g in enumerate(kept, start=1) if gallery[g] == identity]
        if not hits:
            continue
        precisions.append(sum(n / rank for n, rank in enumerate(hits, start=1)) / len(hits))
        penalties.append(len(hits) / hits[-1])
        firsts.append(hits[0])
    mean = {"mAP": 100 * np.mean(precisions), "mINP": 100 * np.mean(penalties), "queries": float(len(firsts))}
    return {**mean, **{f"rank{k}": 100 * np.mean([first <= k for first in firsts]) for k in (1, 5, 10)}}


def rank_metrics(blocks, *labels_and_protocol):
    return Ranker(*labels_and_protocol).score(blocks).summary()


def tensors(*values):
    return [torch.tensor(value) for value in values]


def test_three_queries_worked_by_hand():
    # query 0: own camera at rank 1 is left out; matches at ranks 1 and 3 of the rest: AP (1/1 + 2/3) / 2, INP 2/3
    # query 1: one match, at rank 2: AP 1/2, INP 1/2.   query 2: identity 9 is not there: no score
    distances = torch.tensor(
        [[0.1, 0.2, 0.3, 0.4, 0.9], [0.5, 0.1, 0.6, 0.7, 0.4], [0.1, 0.2, 0.3, 0.4, 0.5]],
    )
    labels = tensors([1, 3, 9], [0, 0, 0], [1, 1, 2, 1, 3], [0, 1, 1, 2, 1])
    metrics = rank_metrics([distances], *labels, "cross_camera")
    assert metrics["mAP"] == pytest.approx(100 * (5 / 6 + 1 / 2) / 2)
    assert metrics["mINP"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    assert (metrics["rank1"], metrics["rank5"], metrics["queries"]) == (50.0, 100.0, 2.0)
    plain = rank_metrics([distances], *labels, "plain")
    assert plain["mAP"] == pytest.approx(100 * ((1 + 1 + 3 / 4) / 3 + 1 / 2) / 2)


@pytest.mark.parametrize("protocol", ["cross_camera", "plain"])
@pytest.mark.parametrize(
    ("queries", "gallery", "identities", "cameras", "ties", "junk"),
    [
        (37, 53, 7, 3, False, False),
        (41, 1, 2, 2, False, False),
        (5, 4111, 9, 6, True, False),
        (64, 200, 11, 2, True, True),
    ],
)
def test_equals_the_loop_from_the_definition(queries, gallery, identities, cameras, ties, junk, protocol):
    random = np.random.default_rng(queries)
    distances = random.random((queries, gallery)).astype(np.float32)
    if ties:
        distances = np.round(distances, 1)
    # identity 0 are distractors, which stay; identity 1 of the queries is not in the gallery
    first = -1 if junk else 0
    query_ids, gallery_ids = random.integers(1, identities, queries), random.integers(first, identities, gallery)
    query_ids[0] = gallery_ids[0] = 1
    gallery_ids[gallery_ids == 1] = 0
    query_ids[-1], gallery_ids[-1] = 2, 2
    query_cams, gallery_cams = random.integers(0, cameras, queries), random.integers(0, cameras, gallery)
    query_cams[-1], gallery_cams[-1] = 0, 1
    if junk:
        query_ids[1] = -1
    labels = (query_ids, query_cams, gallery_ids, gallery_cams)
    blocks = torch.tensor(distances).split(17)
    got = rank_metrics(blocks, *map(torch.tensor, labels), protocol)
    assert got == pytest.approx(metrics_by_definition(distances, *labels, protocol))


def test_equal_distances_rank_by_position():
    labels = tensors([5], [0], [6, 5, 6, 5], [1, 1, 1, 1])
    scores = Ranker(*labels, "cross_camera").score([torch.zeros(1, 4)])
    assert scores.average_precision.item() == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert Ranker(*labels, "cross_camera").lists([torch.zeros(1, 4)], 3).tolist() == [[0, 1, 2]]


def test_a_collapsed_model_scores_as_its_ties_fall():
    # all distances are 0: the 300 images of one identity stand at the end of 5,000
    gallery = torch.zeros(5000, dtype=torch.long)
    gallery[4700:] = 1
    labels = (torch.tensor([1]), torch.tensor([0]), gallery, torch.ones(5000, dtype=torch.long))
    scores = Ranker(*labels, "cross_camera").score([torch.zeros(1, 5000)])
    assert scores.first_rank.item() == 4701
    assert scores.inverse_penalty.item() == pytest.approx(300 / 5000)


def test_lists_are_the_ranking_that_is_scored():
    random = np.random.default_rng(3)
    distances = np.round(random.random((20, 31)), 1).astype(np.float32)
    labels = [
        random.integers(-1, 4, 20),
        random.integers(0, 2, 20),
        random.integers(-1, 4, 31),
        random.integers(0, 2, 31),
    ]
    ranker = Ranker(*map(torch.tensor, labels), "cross_camera")
    lists = ranker.lists(torch.tensor(distances).split(7), 40)
    assert lists.shape == (20, 40)
    for q, row in enumerate(lists.tolist()):
        kept = ranking_by_definition(distances[q], labels[0][q], labels[1][q], labels[2], labels[3], "cross_camera")
        assert row == kept + [-1] * (40 - len(kept))
        for g in kept:
            assert ranker.is_match(q, g) == (labels[0][q] == labels[2][g])


def test_scores_of_a_part_of_the_queries():
    random = np.random.default_rng(4)
    distances = torch.tensor(random.random((30, 50)), dtype=torch.float32)
    ranker = Ranker(*(torch.tensor(random.integers(0, n, m)) for n, m in ((5, 30), (3, 30), (5, 50), (3, 50))), "plain")
    whole, part = ranker.score([distances]), ranker.score(distances[12:25].split(4), first_query=12)
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[12:25], b)


def test_a_process_without_queries_has_scores_of_the_same_kind():
    ranker = Ranker(*(torch.tensor(ids) for ids in ([1, 2], [0, 0], [1, 2, 1], [1, 1, 1])), "plain")
    none, all_scores = ranker.score(iter([])), ranker.score(iter([torch.rand(2, 3)]))
    without_match = ranker.score(iter([]), first_query=2)
    for empty in (none, without_match):
        assert [(len(values), values.dtype) for values in empty] == [(0, values.dtype) for values in all_scores]


def test_count_closer_is_the_same_by_both_ways(monkeypatch):
    block = torch.randint(0, 50, (9, 5000)) / 50
    block[4, 4999] = torch.nan
    counts = torch.randint(0, 4, (9,))
    counts[4] = 2
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
    columns = torch.randint(0, 5000, (int(offsets[-1]),))
    rows = torch.repeat_interleave(torch.arange(9), counts).tolist()
    wanted = [
        -1 if r == 4 else int((block[r] < block[r, c]).sum() + (block[r, :c] == block[r, c]).sum())
        for r, c in zip(rows, columns.tolist(), strict=True)
    ]
    assert count_closer(block, offsets, columns).tolist() == wanted
    monkeypatch.setattr(retrieval, "BLOCK_ROWS", 2)  # pairs at a time
    monkeypatch.setattr(retrieval, "BLOCK_ELEMENTS", 0)
    assert retrieval.count_closer_torch(block, offsets, columns).tolist() == wanted


def test_distances_equal_the_squared_euclidean_ones():
    query, gallery = normalize(torch.randn(11, 6)), normalize(torch.randn(23, 6))
    blocks = list(distance_blocks(query, gallery, 4))
    assert [len(block) for block in blocks] == [4, 4, 3]
    torch.testing.assert_close(torch.cat(blocks), torch.cdist(query, gallery) ** 2, atol=1e-5, rtol=1e-5)


def test_reference_implementation():
    golden = {name: torch.tensor(value) for name, value in np.load(GOLDEN).items()}
    blocks = list(distance_blocks(golden["query_features"], golden["gallery_features"], 7))
    torch.testing.assert_close(torch.cat(blocks), golden["distmat"], atol=5e-6, rtol=0)
    labels = [golden[name].long() for name in ("query_ids", "query_cams", "gallery_ids", "gallery_cams")]
    ranker = Ranker(*labels, "cross_camera")
    for distances, prefix in ((blocks, ""), ([golden["reranked"]], "reranked_")):
        scores = ranker.score(distances)
        metrics = scores.summary()
        first = scores.first_rank[scores.first_rank > 0]
        cmc = torch.stack([(first <= k).float().mean() for k in range(1, 21)])
        assert metrics["mAP"] == pytest.approx(100 * golden[f"{prefix}mAP"].item(), abs=1e-4)
        torch.testing.assert_close(cmc, golden[f"{prefix}cmc"], atol=1e-6, rtol=0)
        assert metrics["queries"] == golden["num_valid_queries"].item() == 35
        assert scores.average_precision.isnan().sum() == 5


def test_one_camera_says_which_protocol_to_take():
    labels = tensors([1, 2], [-1, -1], [1, 2], [-1, -1])
    message = (
        "evaluation: 0 of 2 queries have a match in the gallery: all matches are from the query's own camera. "
        'Set protocol "plain" if cameras are unknown.'
    )
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Ranker(*labels, "cross_camera")
    assert str(error.value) == message
    assert rank_metrics([torch.tensor([[0.0, 1.0], [1.0, 0.0]])], *labels, "plain")["mAP"] == 100


def test_messages():
    with pytest.raises(ValueError, match=r"0 of 2 queries .* none of 2 query identities is among the 3 of the gallery"):
        Ranker(*tensors([1, 2], [0, 0], [3, 4, 5], [1, 1, 1]), "cross_camera")
    with pytest.raises(ValueError, match=r"protocol 'camera' is unknown. Use one of cross_camera, plain"):
        Ranker(*tensors([1], [0], [1], [1]), "camera")
    with pytest.raises(ValueError, match="the gallery has 3 images of identity 4"):
        Ranker(*tensors([4, 2], [-1, -1], [4, 2, 4, 4], [-1] * 4), "one_per_identity")
    with pytest.raises(ValueError, match="the query has 1 identities and 2 cameras"):
        Ranker(*tensors([4], [0, 0], [4], [1]), "plain")
    ranker = Ranker(*tensors([4], [0], [4], [1]), "plain")
    with pytest.raises(ValueError, match=r"distances of queries 0..1 to 1 gallery images do not fit 1 queries"):
        ranker.score([torch.zeros(2, 1)])


def test_one_per_identity_leaves_nothing_out():
    distances = torch.tensor([[0.3, 0.1, 0.2]])
    labels = tensors([7], [-1], [7, 8, 9], [-1, -1, -1])
    metrics = rank_metrics([distances], *labels, "one_per_identity")
    assert metrics["mAP"] == pytest.approx(100 / 3)
    assert (metrics["rank1"], metrics["rank5"]) == (0, 100)


def test_retrieve_takes_the_records_of_a_data_set():
    query = [Record("", 1, 0), Record("", 2, 0)]
    gallery = [Record("", 1, 0), Record("", 2, 1), Record("", 1, 1)]
    feats = normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    metrics = retrieve(
        feats,
        normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])),
        ReIDData([], query, gallery, "cross_camera"),
    )
    # query 1: its own camera left out, then position 1 before its match at 2; query 2: its match second
    assert metrics["mAP"] == pytest.approx(50)
    assert metrics["queries"] == 2


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan])
def test_nan_is_not_ranked(bad):
    ranker = Ranker(torch.tensor([0, 1]), torch.zeros(2), torch.tensor([0, 1, 1]), torch.ones(3), "cross_camera")
    distance = torch.rand(2, 3)
    distance[1, 0] = bad
    with pytest.raises(ValueError, match=r"evaluation: 1 of the queries 0\.\.1 have a distance that is NaN"):
        ranker.score([distance])
    with pytest.raises(ValueError, match=r"evaluation: 1 of the queries 1\.\.1 have a distance that is NaN"):
        ranker.lists([distance[1:]], 2, first_query=1)
