"""Epochs of one pass, rates by epoch, an optimiser that forgets, losses that begin late: a run and its resumption."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.hooks import ResetStateHook
from fastreid_uns.hook import HookBase
from fastreid_uns.utils import checkpoint

CLUSTERS = ["PSEUDO_LABELS.K1=8", "PSEUDO_LABELS.K2=3", "PSEUDO_LABELS.MIN_SAMPLES=2", "MODEL.BACKBONE.WIDTH=8"]
KEYS = [
    *CLUSTERS,
    "SOLVER.BASE_LR=0.002",
    "SOLVER.EPOCHS=3",
    "SOLVER.ITERS_PER_EPOCH=0",
    "SOLVER.WARMUP_EPOCHS=2",
    "SOLVER.WARMUP_BY=epoch",
    "SOLVER.WARMUP_FACTOR=0.5",
    "SOLVER.RATE_FACTORS={encoder.head: 2.0}",
    "SOLVER.FREEZE=[encoder.backbone.stages.stage1]",
    "SOLVER.RESET_STATE=true",
    "MODEL.LOSSES.late={NAME: SoftTripletLoss, WEIGHT: 0.5, START_EPOCH: 1}",
    "CHECKPOINT.KEEP=3",
    "DATALOADER.SAMPLER.NUM_INSTANCES=2",
    "DATALOADER.SAMPLER.BATCH_SIZE=8",
]


class Rates(HookBase):
    """Notes the rates and the number of moments of each step."""

    order = 25

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[float], int]] = []

    def before_step(self) -> None:
        groups = self.trainer.optimizer.param_groups
        rates = sorted({group["lr"] for group in groups})
        self.seen.append((self.trainer.epoch, rates, len(self.trainer.optimizer.state)))


def lines(trainer: DefaultTrainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def straight(tiny) -> tuple[DefaultTrainer, Rates]:
    trainer, rates = DefaultTrainer(load_config(overrides=[*tiny, *KEYS])), Rates()
    trainer.add_hook(rates)
    trainer.train()
    return trainer, rates


def differing(one: object, two: object, name: str = "") -> list[str]:
    """Names of the leaves in which two nested states differ."""
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        one, two = dict(enumerate(one)), dict(enumerate(two))
    if isinstance(one, dict) and isinstance(two, dict):
        return [
            leaf for key in one.keys() | two.keys() for leaf in differing(one.get(key), two.get(key), f"{name}.{key}")
        ]
    same = torch.equal(one, two) if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor) else one == two
    return [] if same else [name]


def test_a_run_of_passes(straight):
    trainer, rates = straight
    written = lines(trainer)
    steps = [(96 - line["outliers"]) // 8 for line in written]
    assert [sum(epoch == seen[0] for seen in rates.seen) for epoch in range(3)] == steps
    assert trainer.iter == sum(steps)
    assert len(set(steps)) > 1  # the clusterings differ
    for epoch, rate in enumerate([0.001, 0.0015, 0.002]):
        for _, found, _ in (seen for seen in rates.seen if seen[0] == epoch):
            assert found == pytest.approx([rate, 2 * rate])
    assert ["loss_late" in line for line in written] == [False, True, True]


def test_the_moments_are_forgotten_at_each_clustering(straight):
    trainer, rates = straight
    first = [next(moments for epoch, _, moments in rates.seen if epoch == number) for number in range(3)]
    assert first == [0, 0, 0]
    assert rates.seen[-1][2] > 10
    assert trainer.hook(ResetStateHook).order < 20


def test_what_is_frozen_stays_as_it_was(straight):
    trainer, _ = straight
    torch.manual_seed(trainer.cfg.SEED)
    fresh = DefaultTrainer.build_model(trainer.cfg, 96).state_dict()
    frozen = [name for name, p in trainer.model.named_parameters() if not p.requires_grad]
    own = [name for name in frozen if name.startswith("encoder.backbone.stages.stage1.")]
    assert own
    trained = trainer.model.state_dict()
    assert all(torch.equal(trained[name], fresh[name]) for name in own)


@pytest.mark.parametrize("done", [1, 2])
def test_a_resumed_run_is_the_same_run_bit_for_bit(straight, tiny, tmp_path, done):
    trainer, _ = straight
    half = tmp_path / "half"
    half.mkdir()
    file = trainer.folder / f"checkpoint_{done:04d}.pth"
    shutil.copy(file, half)
    checkpoint.point_to_last(half / file.name)
    torch.rand(5)
    resumed = DefaultTrainer(load_config(overrides=[*tiny, *KEYS, f"OUTPUT_DIR={half}"]))
    resumed.resume()
    resumed.train()
    expected = trainer.state_dict()
    del expected["hooks"]["Rates"]
    assert differing(resumed.state_dict(), expected) == []
    assert [line["loss"] for line in lines(resumed)] == [line["loss"] for line in lines(trainer)]
