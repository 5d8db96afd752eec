"""The features that cluster against those of a training step."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.config import load_config
from fastreid_uns.engine.agreement import AgreementHook
from fastreid_uns.engine.default import DefaultTrainer

ONE_EPOCH = ["SOLVER.EPOCHS=1", "TEST.PERIOD=0"]


def prepared(tiny: list[str], *keys: str) -> tuple[DefaultTrainer, AgreementHook]:
    trainer = DefaultTrainer(load_config(overrides=[*tiny, *ONE_EPOCH, *keys]))
    return trainer, trainer.hook(AgreementHook)


def test_the_mean_cosine_of_one_batch_and_nothing_changes(tiny: list[str]) -> None:
    trainer, hook = prepared(tiny, "MODEL.BACKBONE.WIDTH=8")
    model = trainer.model.eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    hook.before_epoch()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training

    pixels = torch.stack([trainer.train_loader.images[i] for i in range(0, 96, 6)])  # 16 of 96 images
    with torch.no_grad():
        clustered = model.eval().encoder(pixels).feats
        trained = model.train().encoder(pixels).feats
    wanted = (
        sum(float(F.normalize(a, dim=0) @ F.normalize(b, dim=0)) for a, b in zip(clustered, trained, strict=True)) / 16
    )
    assert trainer.metrics["feature_agreement"] == pytest.approx(wanted, abs=1e-5)


def test_frozen_norms_without_a_neck_agree(tiny: list[str]) -> None:
    trainer, hook = prepared(tiny, "MODEL.FREEZE_NORM=true", "MODEL.HEAD.NECK=none")
    hook.before_epoch()
    assert trainer.metrics["feature_agreement"] == pytest.approx(1.0, abs=1e-5)


def test_the_momentum_encoder_is_what_clusters(tiny: list[str]) -> None:
    trainer, hook = prepared(tiny, "MODEL.FREEZE_NORM=true", "MODEL.HEAD.NECK=none", "MODEL.MOMENTUM_ENCODER=true")
    for parameter in trainer.model.teacher.parameters():
        parameter.copy_(torch.randn_like(parameter))
    hook.before_epoch()
    assert trainer.metrics["feature_agreement"] < 0.9


@pytest.mark.parametrize("weights", [True, False])
def test_a_low_agreement_at_the_start_from_weights_warns(
    weights: bool, tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, _ = prepared(tiny)
    torch.save(trainer.model.encoder.state_dict(), tmp_path / "w.pth")
    other = [f"OUTPUT_DIR={tmp_path / 'other'}"]
    trainer, hook = prepared(tiny, *other, f"MODEL.WEIGHTS={tmp_path / 'w.pth' if weights else ''}")
    hook.before_epoch()
    assert trainer.metrics["feature_agreement"] < 0.5  # a fresh neck subtracts the mean of the batch
    assert ("training starts far from MODEL.WEIGHTS" in caplog.text) == weights


def test_more_images_in_a_batch_than_in_the_set_and_the_log_of_a_run(tiny: list[str], tmp_path: Path) -> None:
    trainer, hook = prepared(tiny, "SOLVER.ACCUMULATE=2")
    assert hook.rows == [0, 12, 24, 36, 48, 60, 72, 84]
    count, trainer.train_set.num_images = trainer.train_set.num_images, 3
    assert AgreementHook(trainer.train_loader, parts=2, pretrained=False).rows == [0, 0, 0, 1, 1, 1, 2, 2]
    trainer.train_set.num_images = count
    trainer.train()
    line = json.loads((trainer.folder / "metrics.jsonl").read_text().splitlines()[0])
    assert -1 <= line["feature_agreement"] <= 1
