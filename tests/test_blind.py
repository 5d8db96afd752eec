"""Training sees no identity: other identities, same weights."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.registry import DATASET_REGISTRY
from fastreid_uns.structures import ReIDData

QUICKSTART = Path(__file__).parents[1] / "configs/quickstart.yaml"


@DATASET_REGISTRY.register()
def relabelled_synthetic(*, source: dict, shuffle: bool = False) -> ReIDData:
    """A data set whose training identities change owners; paths and cameras stay."""
    data = DATASET_REGISTRY.build(source)
    identities = [record.identity for record in data.train]
    if shuffle:
        random.Random(5).shuffle(identities)
    train = [record._replace(identity=identity) for record, identity in zip(data.train, identities, strict=True)]
    return data._replace(train=train)


@pytest.fixture
def train(tiny, tiny_set, tmp_path):
    def run(shuffle: bool) -> tuple[dict[str, torch.Tensor], list[dict]]:
        section = {"NAME": "relabelled_synthetic", "SOURCE": tiny_set, "SHUFFLE": shuffle}
        folder = tmp_path / f"shuffle_{shuffle}"
        changes = [f"DATASETS.TRAIN={json.dumps(section)}", f"OUTPUT_DIR={folder}", "LOG.CLUSTER_QUALITY=true"]
        clusters = ["PSEUDO_LABELS.K1=8", "PSEUDO_LABELS.K2=3", "PSEUDO_LABELS.MIN_SAMPLES=2"]
        trainer = DefaultTrainer(load_config(QUICKSTART, [*tiny, *changes, *clusters]))
        trainer.train()
        assert trainer.metrics["clusters"] > 1
        logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return trainer.model.state_dict(), logged

    return run


def test_shuffled_training_identities_change_no_weight(train):
    (weights, log), (blind_weights, blind_log) = train(False), train(True)
    # the log of cluster quality does see them, which shows that the shuffle arrived
    assert log[-1]["ARI"] != blind_log[-1]["ARI"]
    assert weights.keys() == blind_weights.keys()
    for name, value in weights.items():
        assert torch.equal(value, blind_weights[name]), name
