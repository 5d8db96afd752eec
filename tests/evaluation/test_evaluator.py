from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastreid_uns.evaluation import retrieval
from fastreid_uns.evaluation.evaluator import Evaluator
from fastreid_uns.evaluation.extract import extract_features
from fastreid_uns.evaluation.rerank import rerank
from fastreid_uns.evaluation.retrieval import Ranker, retrieve
from fastreid_uns.structures import Record, ReIDData

sys.path.insert(0, str(Path(__file__).parent))
from evaluation_stubs import Images, Model, reid_task


def test_numbers_of_plain_features():
    data, images = reid_task()
    torch.manual_seed(0)
    model = Model()
    metrics = Evaluator(data, images, batch_size=7)(model)
    model.eval()
    feats = model.extract(images.pixels)["feats"].detach()
    expected = retrieve(feats[:9], feats[9:], data)
    assert metrics == pytest.approx(expected)
    assert list(metrics) == ["mAP", "mINP", "rank1", "rank5", "rank10", "queries"]


def test_perfect_features_score_100():
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    identities = [0, 1, 2, 2, 1, 0]
    images = Images(colours[identities][:, :, None, None].expand(-1, -1, 4, 2))
    records = [Record("", identity, i // 3) for i, identity in enumerate(identities)]

    class Mean(torch.nn.Module):
        def extract(self, images):
            return {"feats": torch.nn.functional.normalize(images.float().mean((2, 3)), dim=1)}

    metrics = Evaluator(ReIDData([], records[:3], records[3:], "cross_camera"), images)(Mean())
    assert metrics == {"mAP": 100, "mINP": 100, "rank1": 100, "rank5": 100, "rank10": 100, "queries": 3}


def test_reranking_adds_its_numbers_and_changes_no_other():
    data, images = reid_task()
    torch.manual_seed(0)
    model = Model()
    plain = Evaluator(data, images)(model)
    both = Evaluator(data, images, rerank="jaccard")(model)
    assert {name: both[name] for name in plain} == plain
    assert set(both) - set(plain) == {f"{name}_rerank" for name in ("mAP", "mINP", "rank1", "rank5", "rank10")}
    feats = extract_features(model, images)["feats"]
    scores = Ranker.of(data).score([rerank(feats[:9], feats[9:])])
    assert both["mAP_rerank"] == pytest.approx(scores.summary()["mAP"])


def test_images_must_belong_to_the_records():
    data, images = reid_task()
    with pytest.raises(ValueError, match="32 images for 9 queries and 22 gallery images"):
        Evaluator(data._replace(gallery=data.gallery[1:]), images)


def evaluate_as_one_of_two(rank, file, result):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    retrieval.BLOCK_ROWS, retrieval.BLOCK_ELEMENTS = 1, 50  # two queries in a block, five blocks
    data, images = reid_task()
    torch.manual_seed(0)
    model = Model()
    if rank == 1:
        model.norm.running_mean += 1  # statistics that drifted apart
    evaluator = Evaluator(data, images, batch_size=7)
    found = evaluator(model)
    one_batch = Evaluator(data, images, batch_size=64)(model)  # rank 1 has no batch
    torch.save((found, one_batch, images.asked), f"{result}.{rank}")
    dist.destroy_process_group()


def test_two_processes_give_the_numbers_of_one(tmp_path, monkeypatch):
    torch.multiprocessing.spawn(evaluate_as_one_of_two, (tmp_path / "group", str(tmp_path / "found")), nprocs=2)
    monkeypatch.setattr(retrieval, "BLOCK_ROWS", 1)
    monkeypatch.setattr(retrieval, "BLOCK_ELEMENTS", 50)
    data, images = reid_task()
    torch.manual_seed(0)
    alone = Evaluator(data, images, batch_size=7)(Model())
    asked = []
    for rank in range(2):
        found, one_batch, batches = torch.load(tmp_path / f"found.{rank}", weights_only=True)
        assert found == alone
        assert one_batch == pytest.approx(alone)
        asked.append(batches)
    assert [len(batches) for batches in asked] == [4, 2]  # 3 + 1 and 2 + 0
