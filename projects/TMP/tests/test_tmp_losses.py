"""The losses of TMP against the reference files, plain loops and numbers worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.projects.TMP.losses import MorePositivesLoss, SinglePairLoss

GOLDEN = sorted((Path(__file__).parent / "golden").glob("tmp_*.npz"))


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request) -> dict[str, torch.Tensor]:
    with np.load(request.param) as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def images_of(partner: torch.Tensor) -> torch.Tensor:
    """An index that the two views of an image share."""
    return torch.minimum(torch.arange(len(partner)), partner)


def test_there_are_reference_files():
    assert len(GOLDEN) == 3


@pytest.mark.parametrize("positives", ["sum", "mean"])
def test_value_and_gradient_of_the_reference(golden, positives):
    z = golden["in_z"].requires_grad_()
    loss = MorePositivesLoss(temperature=float(golden["par_tau"]), positives=positives)(F.normalize(z), golden["in_y"])
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden[f"out_L_{positives}"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z.grad, golden[f"out_grad_z_{positives}"], rtol=1e-9, atol=1e-11)


def test_value_and_gradient_of_the_single_pair(golden):
    z = golden["in_z"].requires_grad_()
    loss = SinglePairLoss(temperature=float(golden["par_tau"]))(F.normalize(z), images_of(golden["in_partner"]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), golden["out_ntxent"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(z.grad, golden["out_grad_z_ntxent"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("positives", ["sum", "mean"])
def test_equals_the_plain_loop(positives):
    """Unequal numbers of positives, and a row without one."""
    generator = torch.Generator().manual_seed(0)
    feats = F.normalize(torch.randn(9, 5, dtype=torch.float64, generator=generator))
    labels = [0, 0, 0, 0, 1, 1, 2, 3, 3]
    similarity = (feats @ feats.T / 0.1).tolist()
    total = 0.0
    for i, own in enumerate(labels):
        negatives = sum(math.exp(similarity[i][k]) for k, other in enumerate(labels) if other != own)
        terms = []
        for j, other in enumerate(labels):
            if j != i and other == own:
                positive = math.exp(similarity[i][j])
                terms.append(-math.log(positive / (positive + negatives)))
        if terms:
            total += sum(terms) / (len(terms) if positives == "mean" else 1)
    found = MorePositivesLoss(temperature=0.1, positives=positives)(feats, torch.tensor(labels))
    assert found.item() == pytest.approx(total / 9, rel=1e-12)


def test_values_worked_by_hand():
    """Two views of two images at right angles: each row meets one positive (1) and two negatives (0)."""
    feats = torch.eye(2, dtype=torch.float64).repeat_interleave(2, 0)
    expected = -math.log(math.e**2 / (math.e**2 + 2))
    assert MorePositivesLoss(temperature=0.5)(feats, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(expected)
    # of one cluster there is no negative, so nothing can be lost; the single pair does not know of clusters
    assert MorePositivesLoss(temperature=0.5)(feats, torch.zeros(4, dtype=torch.int64)) == 0
    assert SinglePairLoss(temperature=0.5)(feats, torch.tensor([7, 7, 3, 3])).item() == pytest.approx(expected)


def test_one_view_has_no_pair():
    feats = torch.eye(3, requires_grad=True)
    loss = SinglePairLoss()(feats, torch.arange(3))
    loss.backward()
    assert loss == 0
    assert torch.equal(feats.grad, torch.zeros(3, 3))


def losses(generator_seed: int, dtype: torch.dtype) -> list[tuple]:
    feats = F.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(generator_seed))).to(dtype)
    clusters, images = torch.arange(12) % 3, torch.arange(12) % 6
    return [
        (MorePositivesLoss(positives="sum"), feats, clusters),
        (MorePositivesLoss(), feats, clusters),
        (MorePositivesLoss(), feats, torch.zeros(12, dtype=torch.int64)),
        (SinglePairLoss(), feats, images),
    ]


@pytest.mark.parametrize("case", range(4))
def test_gradients_equal_finite_differences(case):
    loss, feats, ids = losses(0, torch.float64)[case]
    assert torch.autograd.gradcheck(lambda x: loss(x, ids), feats.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", range(4))
def test_half_precision_is_near_float32(case, dtype):
    loss, feats, ids = losses(0, torch.float32)[case]
    expected = loss(feats, ids)
    torch.testing.assert_close(loss(feats.to(dtype), ids), expected, rtol=0.03, atol=0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(feats, ids), expected)


@pytest.mark.parametrize("case", range(4))
def test_order_of_rows_does_not_matter(case):
    loss, feats, ids = losses(1, torch.float64)[case]
    mixed = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(loss(feats[mixed], ids[mixed]), loss(feats, ids))


def test_small_temperature_stays_finite():
    for loss, feats, ids in losses(3, torch.float32):
        loss.temperature = 0.001
        feats.requires_grad_()
        value = loss(feats, ids)
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(feats.grad).all()


def test_parameters_out_of_range():
    with pytest.raises(ValueError, match="MorePositivesLoss: TEMPERATURE is 0; a number above 0"):
        MorePositivesLoss(temperature=0)
    with pytest.raises(ValueError, match="SinglePairLoss: TEMPERATURE is -1"):
        SinglePairLoss(temperature=-1)
    with pytest.raises(ValueError, match="POSITIVES is 'max'; accepted: mean, sum"):
        MorePositivesLoss(positives="max")
