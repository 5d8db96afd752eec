import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_uns.modeling.losses import (
    CrossEntropyLoss,
    InstanceContrastLoss,
    LossSet,
    SoftCrossEntropyLoss,
    SoftTripletLoss,
)
from fastreid_uns.structures import Moment


def test_cross_entropy_with_smoothing_by_hand():
    logits = torch.log(torch.tensor([[0.7, 0.2, 0.1]]))
    labels = torch.tensor([0])
    assert CrossEntropyLoss()(logits, labels).item() == pytest.approx(-math.log(0.7))
    spread = -(math.log(0.7) + math.log(0.2) + math.log(0.1)) / 3
    assert CrossEntropyLoss(smoothing=0.3)(logits, labels).item() == pytest.approx(
        0.7 * -math.log(0.7) + 0.3 * spread, rel=1e-5
    )


def test_soft_cross_entropy_by_hand_and_without_gradient_to_the_teacher():
    logits = torch.log(torch.tensor([[0.5, 0.5]])).requires_grad_()
    teacher = torch.log(torch.tensor([[0.25, 0.75]])).requires_grad_()
    loss = SoftCrossEntropyLoss()(logits, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert teacher.grad is None


def slow_triplet(feats: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    terms = []
    for i in range(len(feats)):
        positives = [(feats[i] - feats[j]).norm() for j in range(len(feats)) if j != i and labels[j] == labels[i]]
        negatives = [(feats[i] - feats[j]).norm() for j in range(len(feats)) if labels[j] != labels[i]]
        if positives and negatives:
            terms.append(F.softplus(max(positives) - min(negatives)))
    return torch.stack(terms).mean() if terms else feats.new_zeros(())


@pytest.mark.parametrize("labels", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 2, 1], [0, 0, 0, 0, 0, 1]])
def test_soft_triplet_equals_the_plain_loop(labels):
    feats = F.normalize(torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    labels = torch.tensor(labels)
    torch.testing.assert_close(SoftTripletLoss()(feats, labels), slow_triplet(feats, labels))


def test_soft_triplet_of_long_features_is_computed_in_full_precision_under_autocast():
    """Features before unit length that point one way: squares near 1600, of which bfloat16 loses the differences."""
    feats = 10 + torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = SoftTripletLoss()(feats, labels)
    torch.testing.assert_close(found, slow_triplet(feats, labels), rtol=1e-4, atol=1e-4)


def test_soft_triplet_of_one_cluster_is_zero_with_a_finite_gradient():
    feats = F.normalize(torch.randn(4, 5)).requires_grad_()
    loss = SoftTripletLoss()(feats, torch.zeros(4, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(feats.grad).all()


def test_loss_set_weights_names_and_feeds_by_name():
    losses = LossSet({"a": (CrossEntropyLoss(), 2.0), "b": (SoftTripletLoss(), 0.0)})
    offer = {"logits": torch.zeros(2, 4), "labels": torch.tensor([0, 1]), "feats": torch.eye(2)}
    outputs = losses(offer)
    assert outputs["loss_a"].item() == pytest.approx(2 * math.log(4))
    assert outputs["loss_b"].item() == 0


def test_a_loss_counts_from_its_first_epoch_on():
    losses = LossSet({"a": (CrossEntropyLoss(), 2.0), "late": (CrossEntropyLoss(), 3.0)}, {"late": 2})
    offer = {"logits": torch.zeros(2, 4), "labels": torch.tensor([0, 1])}
    for epoch in range(4):
        losses.moment = Moment(epoch=epoch)
        expected = {"loss_a": 2 * math.log(4)} | ({"loss_late": 3 * math.log(4)} if epoch >= 2 else {})
        assert {name: value.item() for name, value in losses(offer).items()} == pytest.approx(expected)


def test_what_a_late_loss_lacks_is_told_from_the_start():
    with pytest.raises(KeyError, match=r"MODEL\.LOSSES\.late: CrossEntropyLoss asks for logits, labels"):
        LossSet({"late": (CrossEntropyLoss(), 1.0)}, {"late": 2})({"feats": torch.eye(2)})
    with pytest.raises(ValueError, match=r"MODEL\.LOSSES\.late\.START_EPOCH is -1; 0 \(from the start\) or more"):
        LossSet({"late": (CrossEntropyLoss(), 1.0)}, {"late": -1})


class Told(nn.Module):
    """What a loss is told of the moment."""

    def forward(self, epoch: int, progress: float) -> torch.Tensor:
        return torch.tensor(10 * epoch + progress)


def test_a_loss_may_ask_for_the_moment_and_the_model_may_answer():
    losses = LossSet({"a": (Told(), 1.0)})
    losses.moment = Moment(epoch=3, step=70, progress=0.25)
    assert losses({})["loss_a"].item() == 30.25
    assert losses({"epoch": 1})["loss_a"].item() == 10.25


def test_a_loss_whose_input_the_model_lacks():
    losses = LossSet({"a": (CrossEntropyLoss(), 1.0)})
    with pytest.raises(
        KeyError,
        match=r"MODEL\.LOSSES\.a: CrossEntropyLoss asks for logits; this model has epoch, progress, feats, labels",
    ):
        losses({"feats": torch.eye(2), "labels": torch.tensor([0, 1])})


def test_instance_contrast_equals_a_plain_loop():
    draw = torch.Generator().manual_seed(0)
    first, second = (F.normalize(torch.randn(5, 4, generator=draw, dtype=torch.float64)) for _ in range(2))
    unit = torch.tensor([0, 1, 0, 3, 4])
    expected = 0.0
    for one, other in ((first, second), (second, first)):
        for i in range(5):
            logits = [float(one[i] @ other[j]) / 0.2 for j in range(5)]
            total = np.log(np.sum(np.exp(logits)))
            right = [logits[j] - total for j in range(5) if unit[i] == unit[j]]
            expected -= sum(right) / len(right) / 10
    assert float(InstanceContrastLoss(temperature=0.2)(first, second, unit)) == pytest.approx(expected)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, 7.5])
def test_smoothing_is_a_share(smoothing):
    with pytest.raises(ValueError, match=rf"SMOOTHING is {smoothing}; a share in \[0, 1\) is accepted"):
        CrossEntropyLoss(smoothing=smoothing)
