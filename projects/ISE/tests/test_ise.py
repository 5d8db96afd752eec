"""Support samples, their losses and what they do to the memory: the official code, plain loops, cases by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_uns.modeling.losses import LossSet
from fastreid_uns.modeling.memory import ClusterMemory, InstanceMemory, moved_once
from fastreid_uns.projects.ISE.losses import LabelPreservingLoss, SupportedContrastLoss
from fastreid_uns.projects.ISE.model import ISEModel, nearest_foreign, support_degree, support_samples
from fastreid_uns.structures import Batch, HeadOutput, Moment

GOLDEN = sorted((Path(__file__).parent / "golden").glob("ise_*.npz"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def z(request) -> dict[str, torch.Tensor]:
    found = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(request.param).items()}
    return {key: value.long() if value.dtype == torch.int32 else value for key, value in found.items()}


class Given(nn.Module):
    """Takes the unnormalised feature of each image as its first pixels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor, domains: torch.Tensor | None = None) -> HeadOutput:
        unnormalized = images.flatten(1)[:, : self.dim] * self.scale
        return HeadOutput(unnormalized, F.normalize(unnormalized), unnormalized=unnormalized)


def model(centroids: torch.Tensor, *, weight: float = 0.1, degree: float = 0.25, **memory: float) -> ISEModel:
    net = ISEModel(
        Given(centroids.shape[1]),
        ClusterMemory(centroids.shape[1], **memory),
        LossSet({"contrast": (SupportedContrastLoss(), 1.0), "label": (LabelPreservingLoss(), weight)}),
        9,
        degree=degree,
    )
    net.memory.features = centroids.clone()
    return net.train()


def batch_of(raw: torch.Tensor, labels: torch.Tensor, most: int | None = None) -> Batch:
    none = torch.zeros(len(raw), dtype=torch.int64)
    return Batch((raw[:, None, None],), torch.arange(len(raw)), labels, none, none, most)


def of_file(z: dict[str, torch.Tensor]) -> ISEModel:
    memory = {"momentum": float(z["par_momentum"]), "temperature": float(z["par_tau"]), "hard": bool(z["par_hard"])}
    net = model(z["in_centroids"], weight=float(z["par_weight_lp"]), **memory)
    net.moment = Moment(epoch=1, step=5, progress=float(z["par_progress"]))
    return net


def test_supports_of_the_official_trainer(z):
    feats = F.normalize(z["in_raw"])
    degree = support_degree(float(z["par_progress"]))
    assert degree == pytest.approx(float(z["out_degree"]), rel=1e-6)
    nearest = nearest_foreign(feats, z["in_labels"], z["in_centroids"])
    assert torch.equal(nearest, z["out_nearest"])
    supports = support_samples(feats, z["in_labels"], z["in_centroids"], degree)
    torch.testing.assert_close(supports, z["out_support"], rtol=0, atol=1e-6)


def test_losses_gradients_and_memory_of_the_official_trainer(z):
    net, raw = of_file(z), z["in_raw"].requires_grad_()
    most = int(z["in_labels"].bincount().max())
    outputs = net(batch_of(raw, z["in_labels"], most))
    for name, expected in (("contrast", z["out_loss_memory"]), ("label", z["par_weight_lp"] * z["out_loss_lp"])):
        torch.testing.assert_close(outputs[f"loss_{name}"], expected, rtol=1e-5, atol=5e-6)
    total = outputs["loss_contrast"] + outputs["loss_label"]
    torch.testing.assert_close(total, z["out_loss_total"], rtol=1e-5, atol=5e-6)
    (label,) = torch.autograd.grad(outputs["loss_label"] / z["par_weight_lp"], raw, retain_graph=True)
    (both,) = torch.autograd.grad(total, raw)
    for found, expected in ((label, z["out_grad_raw_lp"]), (both, z["out_grad_raw_total"])):
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 + 1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(net.memory.features, z["out_centroids_after"], rtol=0, atol=1e-6)


def test_the_degree_rises_from_nothing_fast_at_first():
    assert support_degree(0.0) == 0
    assert support_degree(1.0) == pytest.approx(0.25)
    assert support_degree(1.0, highest=0.5) == pytest.approx(0.5)
    assert support_degree((math.sqrt(math.e) - 1) / (math.e - 1)) == pytest.approx(0.125)


def test_a_support_by_hand():
    """From (1, 0) half the way from the own centroid (1, 0) to the nearest other one, (0, 1)."""
    centroids = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    found = support_samples(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), centroids, 0.5)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5]]) * math.sqrt(2))


def test_with_one_cluster_an_image_is_its_own_support():
    feats = F.normalize(torch.randn(3, 4))
    supports = support_samples(feats, torch.zeros(3, dtype=torch.int64), feats[:1], 0.2)
    torch.testing.assert_close(supports, feats)


def test_at_the_start_of_a_run_supports_are_the_images_themselves():
    net = model(F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0))))
    inputs = net.eval().loss_inputs(batch_of(torch.randn(6, 4), torch.arange(6) % 3))
    torch.testing.assert_close(inputs["supports"], inputs["feats"])
    torch.testing.assert_close(inputs["support_logits"], inputs["logits"])


def label_loss_by_loop(feats: np.ndarray, supports: np.ndarray, labels: list[int], temperature: float) -> float:
    near = np.exp(feats @ supports.T / temperature)
    total = 0.0
    for i, own in enumerate(labels):
        positive = min(near[i, j] for j, label in enumerate(labels) if label == own)
        negative = sum(
            max(near[i, j] for j, label in enumerate(labels) if label == other) for other in set(labels) - {own}
        )
        total -= math.log(positive / (positive + negative + 1e-6) + 1e-6)
    return total / len(labels)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [3, 0, 3, 3, 0, 7], [1, 1, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5]])
def test_the_label_loss_equals_a_plain_loop_also_on_ragged_groups(labels):
    draw = torch.Generator().manual_seed(4)
    feats, supports = (F.normalize(torch.randn(6, 5, generator=draw, dtype=torch.float64)) for _ in range(2))
    found = LabelPreservingLoss(temperature=0.3)(feats, supports, torch.tensor(labels))
    assert float(found) == pytest.approx(label_loss_by_loop(feats.numpy(), supports.numpy(), labels, 0.3), rel=1e-12)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("most", [None, 3])
def test_the_memory_is_moved_by_images_and_then_by_supports(hard, most):
    draw = torch.Generator().manual_seed(1)
    centroids = F.normalize(torch.randn(4, 6, generator=draw))
    labels = torch.tensor([0, 1, 0, 0, 2])
    net = model(centroids, momentum=0.3, hard=hard)
    net.moment = Moment(progress=0.8)
    inputs = net.loss_inputs(batch_of(torch.randn(5, 6, generator=draw), labels, most))
    rows = [row.clone() for row in centroids]
    both = [*zip(labels.tolist(), inputs["feats"], strict=True), *zip(labels.tolist(), inputs["supports"], strict=True)]
    for label in (0, 1, 2):
        own = [sample for of, sample in both if of == label]
        if hard:
            own = [min(own, key=lambda sample, label=label: float(sample.detach() @ centroids[label]))]
        for sample in own:
            rows[label] = F.normalize(0.3 * rows[label] + 0.7 * sample, dim=0)
    torch.testing.assert_close(net.memory.features, torch.stack(rows))


def test_a_batch_in_parts_moves_the_memory_once():
    """Parts of whole clusters, as a sampler makes them: the rows are those of the whole batch."""
    draw = torch.Generator().manual_seed(2)
    centroids, raw = F.normalize(torch.randn(3, 6, generator=draw)), torch.randn(6, 6, generator=draw)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    whole, parts = (model(centroids, momentum=0.3) for _ in range(2))
    whole(batch_of(raw, labels, most=2))
    with moved_once(parts):
        for first in (0, 2, 4):
            parts(batch_of(raw[first : first + 2], labels[first : first + 2], most=2))
            assert torch.equal(parts.memory.features, centroids)
    torch.testing.assert_close(parts.memory.features, whole.memory.features)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(torch.eye(2), degree=1.5), "DEGREE is 1.5; 0 to 1 is accepted"),
        (lambda: LabelPreservingLoss(temperature=0.0), "TEMPERATURE is 0.0; a number above 0"),
        (lambda: ISEModel(Given(2), None, LossSet({}), 3), "ISEModel got none; .* Set it to ClusterMemory"),
        (lambda: ISEModel(Given(2), InstanceMemory(2), LossSet({}), 3), "ISEModel got InstanceMemory"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
