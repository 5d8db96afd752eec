"""How the model of ICE wires views, encoders, memory and proxies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_uns.config import load_config
from fastreid_uns.modeling.losses import LossSet
from fastreid_uns.modeling.memory import ClusterMemory
from fastreid_uns.modeling.proxies import CentroidMemory
from fastreid_uns.projects.ICE.model import ICEModel
from fastreid_uns.registry import LOSS_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, HeadOutput, PseudoLabels

HERE = Path(__file__).parent
GOLDEN = sorted((HERE / "golden").glob("ice_*.npz"))
METHOD = HERE.parent / "configs/method.yaml"


class Given(nn.Module):
    """An encoder whose images are features before unit length already; it remembers what it was given."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm1d(dim, affine=False)
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> HeadOutput:
        self.seen.append(images)
        raw = self.scale * images
        self.norm(raw)
        return HeadOutput(raw, F.normalize(raw), unnormalized=raw)


def build(dim: int, overrides=(), num_images: int = 8, **keys) -> ICEModel:
    """The model of `method.yaml` around an encoder of given features."""
    model = load_config(METHOD, overrides).MODEL
    losses = {name: (LOSS_REGISTRY.build(section), section.WEIGHT) for name, section in model.LOSSES.items()}
    memory = CentroidMemory(dim, temperature=model.MEMORY.TEMPERATURE)
    return ICEModel(Given(dim), memory, LossSet(losses), num_images, **keys).train()


def batch_of(*views: torch.Tensor, labels=None, cameras=None) -> Batch:
    count = len(views[0])
    labels = torch.zeros(count).long() if labels is None else labels
    cameras = torch.zeros(count).long() if cameras is None else cameras
    return Batch(views, torch.arange(count), labels, cameras, torch.zeros(count).long())


@pytest.fixture
def fitted() -> tuple[ICEModel, tuple[torch.Tensor, ...]]:
    """Eight images of four clusters and two cameras, and three views of them."""
    generator = torch.Generator().manual_seed(0)
    views = tuple(torch.randn(8, 6, generator=generator) for _ in range(3))
    labels, cameras = torch.arange(8) // 2, torch.arange(8) % 2
    feats = F.normalize(views[2])
    model = build(6)
    model.update_memory(PseudoLabels(labels, torch.zeros(4, 6)), FeatureBank(feats, cameras))
    return model, batch_of(*views, labels=labels, cameras=cameras)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_step_of_the_official_trainer(path):
    """Every loss with the weight that `method.yaml` gives it; the similarities to proxies are those of its code."""
    z = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(path).items()}
    z = {key: value.float() if value.is_floating_point() else value for key, value in z.items()}
    model = build(z["in_f1"].shape[1], ["MODEL.LOSSES.camera.AXIS=coordinates"])
    model.memory.features = z["in_centers"]
    proxies = model.proxies
    proxies.features, proxies.labels, proxies.cameras = z["in_proxies"], z["in_proxy_label"], z["in_proxy_cam"]
    raw = z["in_f1"].requires_grad_()
    outputs = model(batch_of(raw, z["in_k2"], z["in_kweak"], labels=z["in_labels"], cameras=z["in_cams"]))
    for name, official in {"contrast": "ccl", "hard": "vcl", "soft": "kl", "camera": "cam"}.items():
        torch.testing.assert_close(outputs[f"loss_{name}"], z[f"out_loss_{official}"], rtol=1e-4, atol=1e-5)
    sum(value for name, value in outputs.items() if name.startswith("loss")).backward()
    torch.testing.assert_close(raw.grad, z["out_grad_f1_total"], rtol=1e-3, atol=1e-5)


def test_the_first_view_is_the_query_and_the_others_go_through_the_momentum_encoder(fitted):
    model, batch = fitted
    inputs = model.loss_inputs(batch)
    assert torch.equal(inputs["unnormalized"], batch.views[0])
    torch.testing.assert_close(inputs["teacher_feats"], F.normalize(batch.views[1]))
    torch.testing.assert_close(inputs["weak_feats"], F.normalize(batch.views[2]))
    assert not inputs["teacher_feats"].requires_grad
    assert len(model.encoder.seen) == 1


def test_keys_are_shuffled_before_the_norm_layers_and_put_back(fitted):
    model, batch = fitted
    torch.manual_seed(0)
    model.loss_inputs(batch)
    order = None
    for given, view in zip(model.teacher.seen, batch.views, strict=True):
        places = (given[:, None] == view[None]).all(2).int().argmax(1)
        assert sorted(places.tolist()) == list(range(8)) != places.tolist()
        assert order is None or torch.equal(places, order)  # all views change places alike
        order = places


def test_the_momentum_encoder_gathers_norm_statistics_from_all_three_views_in_order(fitted):
    model, batch = fitted
    mean, variance = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    model.loss_inputs(batch)
    for view in batch.views:  # query, key, weak: each moves the running values by a tenth
        rows = [view[i].double() for i in range(8)]
        of_batch = sum(rows) / 8
        mean = 0.9 * mean + 0.1 * of_batch
        variance = 0.9 * variance + 0.1 * sum((row - of_batch) ** 2 for row in rows) / 7
    torch.testing.assert_close(model.teacher.norm.running_mean.double(), mean, rtol=0, atol=1e-7)
    torch.testing.assert_close(model.teacher.norm.running_var.double(), variance, rtol=0, atol=2e-7)
    assert model.teacher.norm.num_batches_tracked == 3
    assert model.encoder.norm.num_batches_tracked == 1  # the query alone


def test_raw_or_unit_queries_meet_the_memory(fitted):
    model, batch = fitted
    raw = model.loss_inputs(batch)["logits"]
    torch.testing.assert_close(raw, batch.views[0] @ model.memory.features.T / 0.5)
    model.unnormalized_queries = False
    unit = model.loss_inputs(batch)["logits"]
    torch.testing.assert_close(unit, F.normalize(batch.views[0]) @ model.memory.features.T / 0.5)


def test_clustering_and_evaluation_use_the_momentum_encoder(fitted):
    model, batch = fitted
    with torch.no_grad():
        model.teacher.scale.fill_(-1.0)
    torch.testing.assert_close(model.extract(batch.views[0])["feats"], -F.normalize(batch.views[0]))


def test_a_new_clustering_makes_centroids_and_proxies_anew(fitted):
    model, _ = fitted
    feats = F.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(1)))
    labels = torch.tensor([0, 0, 0, 1, 1, 1, -1, -1])
    model.update_memory(PseudoLabels(labels, torch.zeros(2, 6)), FeatureBank(feats, torch.arange(8) % 2))
    torch.testing.assert_close(model.memory.features, torch.stack([feats[:3].mean(0), feats[3:6].mean(0)]))
    expected = torch.stack([feats[[0, 2]], feats[[4, 4]], feats[[3, 5]]]).mean(1)
    torch.testing.assert_close(model.proxies.features[[0, 2, 3]], F.normalize(expected))


def test_no_camera_loss_needs_no_cameras():
    model = build(6, ["MODEL.LOSSES.camera=null"])
    feats = F.normalize(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    model.update_memory(PseudoLabels(torch.arange(8) // 2, torch.zeros(4, 6)), FeatureBank(feats, torch.full((8,), -1)))
    unknown = batch_of(feats, feats, feats, labels=torch.arange(8) // 2, cameras=torch.full((8,), -1))
    assert sorted(model(unknown)) == ["accuracy", "loss_contrast", "loss_hard", "loss_soft"]


def test_a_camera_loss_on_data_without_cameras_is_refused(fitted):
    model, _ = fitted
    bank = FeatureBank(F.normalize(torch.ones(8, 6)), torch.full((8,), -1))
    with pytest.raises(ValueError, match=r"the 8 clustered images are of 0 known camera\(s\)"):
        model.update_memory(PseudoLabels(torch.arange(8) // 2, torch.zeros(4, 6)), bank)


def test_labelled_sources_are_refused(fitted):
    model, _ = fitted
    bank = FeatureBank(torch.ones(8, 6), torch.zeros(8), source_feats=torch.ones(1, 6), source_labels=torch.zeros(1))
    with pytest.raises(ValueError, match=r"DATASETS.SOURCES names labelled sets.*Drop"):
        model.update_memory(PseudoLabels(torch.arange(8) // 2, torch.zeros(4, 6)), bank)


def test_views_that_are_missing_are_named(fitted):
    model, batch = fitted
    with pytest.raises(ValueError, match=r"INPUT\.VIEWS names 2 view"):
        model(batch._replace(views=batch.views[:2]))


def test_one_view_is_query_and_key_where_no_weak_one_is_wanted():
    model = build(6, ["MODEL.LOSSES.camera=null", "MODEL.LOSSES.soft=null"])
    view = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model.memory.features = F.normalize(view)
    torch.testing.assert_close(model.loss_inputs(batch_of(view))["teacher_feats"], F.normalize(view))


def test_a_momentum_encoder_is_needed():
    with pytest.raises(ValueError, match="MOMENTUM_ENCODER is false"):
        build(6, momentum_encoder=False)


def test_raw_queries_never_move_a_memory():
    with pytest.raises(
        ValueError, match=r"UNNORMALIZED_QUERIES is true and MODEL\.MEMORY is ClusterMemory.*CentroidMemory"
    ):
        ICEModel(Given(6), ClusterMemory(6), LossSet({}), 8)


def test_a_memory_is_needed():
    with pytest.raises(ValueError, match=r"MODEL\.MEMORY has no NAME.*Name CentroidMemory"):
        ICEModel(Given(6), None, LossSet({}), 8)
