"""The model of TMP, what its configs say, and the bad input that a user meets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.recluster import ReclusterHook
from fastreid_uns.engine.solver import learning_rate_factor
from fastreid_uns.modeling.losses import LossSet, SoftTripletLoss
from fastreid_uns.projects.TMP.losses import MorePositivesLoss, SinglePairLoss
from fastreid_uns.projects.TMP.model import InBatchModel
from fastreid_uns.registry import SAMPLER_REGISTRY
from fastreid_uns.structures import Batch, HeadOutput, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"


class Rows(nn.Module):
    """An encoder that gives the first pixels, and remembers what it was given."""

    dim = 2

    def forward(self, images: Tensor, domains: Tensor) -> HeadOutput:
        self.given = images
        self.domains = domains
        raw = images[:, :2, 0, 0]
        return HeadOutput(raw, nn.functional.normalize(raw), unnormalized=raw)


def batch(views: int) -> Batch:
    """Three images; view v of image i is filled with 10 i + v + 1."""
    made = tuple(
        torch.tensor([10.0 * i + v + 1 for i in range(3)]).view(3, 1, 1, 1).expand(3, 3, 2, 2) for v in range(views)
    )
    return Batch(made, torch.tensor([7, 3, 5]), torch.tensor([0, 1, 0]), torch.arange(3), torch.tensor([1, 0, 0]))


def model(**losses: nn.Module) -> InBatchModel:
    return InBatchModel(Rows(), None, LossSet({name: (loss, 1.0) for name, loss in losses.items()}), 9)


def test_views_of_an_image_stand_side_by_side():
    trained = model(positives=MorePositivesLoss())
    inputs = trained.loss_inputs(batch(2))
    assert trained.encoder.given[:, 0, 0, 0].tolist() == [1, 2, 11, 12, 21, 22]
    assert trained.encoder.domains.tolist() == [1, 1, 0, 0, 0, 0]
    assert inputs["labels"].tolist() == [0, 0, 1, 1, 0, 0]
    assert inputs["index"].tolist() == [7, 7, 3, 3, 5, 5]
    assert inputs["cameras"].tolist() == [0, 0, 1, 1, 2, 2]
    assert set(inputs) == {"pooled", "feats", "unnormalized", "labels", "index", "cameras", "domains"}


def test_the_triplet_of_table_4_sees_batches_of_p_x_k():
    section = load_config(CONFIGS / "ablations/triplet.yaml").DATALOADER.SAMPLER
    sampler = SAMPLER_REGISTRY.build(section, 3, 0, 0, 1)
    labels = torch.cat([torch.arange(70).repeat_interleave(5), torch.arange(70, 80)])  # 70 clusters, 10 images alone
    sampler.set_epoch(0, PseudoLabels(labels, torch.zeros(80, 2)), torch.full((360,), -1))
    for batch in sampler:
        counts = labels[torch.tensor(batch)].bincount(minlength=80)
        assert len(batch) == 256
        cut = [count for count in counts[:70].tolist() if count not in (0, 4)]
        assert len(cut) <= 2  # groups that the ends of a batch cut
        assert set(counts[70:].tolist()) <= {0, 1}


@pytest.mark.parametrize(("views", "positives"), [(1, 2 / 3), (2, (3 * 4 + 1 * 2) / 6)])
def test_positives_are_counted(views, positives):
    """Of V views, a row of the two images of cluster 0 has 2 V - 1 positives, one of cluster 1 has V - 1."""
    outputs = model(positives=MorePositivesLoss())(batch(views))
    assert outputs["positives"].item() == pytest.approx(positives)


def test_losses_of_the_core_and_of_the_comparison_find_their_tensors():
    outputs = model(more=MorePositivesLoss(), pair=SinglePairLoss(), triplet=SoftTripletLoss())(batch(2))
    assert set(outputs) == {"loss_more", "loss_pair", "loss_triplet", "positives"}
    assert all(torch.isfinite(value) for value in outputs.values())


@pytest.fixture
def small(tiny) -> list[str]:
    few = [value for value in tiny if not value.startswith(("DATALOADER.SAMPLER.NUM", "INPUT.AUGMENTS"))]
    return [*few, "PSEUDO_LABELS.K1=8", "PSEUDO_LABELS.K2=3", "MODEL.BACKBONE.WIDTH=8"]


def keys(**values: object) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def test_every_image_is_in_a_cluster_and_can_be_drawn(small):
    trainer = DefaultTrainer(load_config(CONFIGS / "synthetic.yaml", [*small, "PSEUDO_LABELS.EPS=0.2"]))
    trainer.train()
    pseudo: PseudoLabels = trainer.hook(ReclusterHook).pseudo
    assert (pseudo.labels >= 0).all()
    assert (pseudo.sizes == 1).any()


def test_k_means_labels_train(small):
    section = {"NAME": "ReliableKMeansLabels", "NUM_CLUSTERS": 12, "SIMILARITY": 0.9}
    few = [value for value in small if not value.startswith("PSEUDO_LABELS")]
    trainer = DefaultTrainer(load_config(CONFIGS / "synthetic.yaml", [*few, *keys(PSEUDO_LABELS=section)]))
    trainer.train()
    assert trainer.iter == 4
    assert trainer.hook(ReclusterHook).pseudo.num_clusters > 12


def test_rates_of_the_paper():
    """0.3 for 256 images, in proportion for others; warm-up from 1e-4 over two epochs, then a cosine to zero."""
    for name, images in {"market": 256, "ablations/batch_64": 64, "ablations/batch_1024": 1024}.items():
        solver = load_config(CONFIGS / f"{name}.yaml").SOLVER
        assert pytest.approx(0.3 * images / 256) == solver.BASE_LR
        assert 12_936 // images == solver.ITERS_PER_EPOCH
    cfg = load_config(CONFIGS / "market.yaml")
    assert learning_rate_factor(cfg, 0) == pytest.approx(1e-4)
    assert [learning_rate_factor(cfg, epoch * 50) for epoch in (1, 2, 31, 60)] == pytest.approx([0.50005, 1, 0.5, 0])


def test_the_ablation_changes_the_loss_alone():
    for name in ("omniglot", "grocery"):
        whole, baseline = (load_config(CONFIGS / f"{name}{ending}.yaml") for ending in ("", "_baseline"))
        assert [loss.NAME for loss in baseline.MODEL.LOSSES.values()] == ["SinglePairLoss"]
        for cfg in (whole, baseline):
            cfg.defrost()
            cfg.MODEL.LOSSES.clear()
            cfg.OUTPUT_DIR = ""
        assert whole == baseline


def test_pictures_that_are_not_there_and_sets_without_cameras(small, tmp_path):
    style = keys(**{"INPUT.CAMERA_STYLE": {"KIND": "images", "FOLDER": str(tmp_path / "camstyle")}})
    with pytest.raises(FileNotFoundError, match=r"INPUT\.CAMERA_STYLE\.FOLDER: .*camstyle.*KIND: colors needs no"):
        DefaultTrainer(load_config(CONFIGS / "synthetic.yaml", [*small, *style]))
    for name in ("grocery", "omniglot"):
        assert load_config(CONFIGS / f"{name}.yaml").INPUT.AUGMENTS.train.CAMERA_STYLE == 0
