"""The sparse losses against the released loss (golden files), a plain loop and their closed-form gradient."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.projects.ASCL.losses import (
    SparseContrastiveLoss,
    composite_contrast,
    full_groups,
    sparse_pairs,
    weighted_contrast,
)

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
GOLDEN = sorted((HERE / "golden").glob("ascl_*.npz"))
VARIANTS = {"": (0.25, 0.25), "_cscl": (1.0, 0.0), "_wscl": (0.0, 1.0)}


def read(path: Path) -> dict[str, torch.Tensor]:
    with np.load(path) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file}


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def golden(request) -> dict[str, torch.Tensor]:
    return read(request.param)


def test_both_losses_have_the_weight_of_the_released_code(golden):
    loss = SparseContrastiveLoss()
    assert loss.composite == loss.weighted == float(golden["scale"])


def loss_of(case: dict, composite: float = 0.25, weighted: float = 0.25) -> SparseContrastiveLoss:
    return SparseContrastiveLoss(temperature=float(case["tau"]), composite=composite, weighted=weighted)


def test_there_are_six_golden_cases():
    assert len(GOLDEN) == 6


def test_full_clusters_are_those_of_the_released_loss(golden):
    groups = full_groups(golden["labels"])
    assert groups.shape == (len(golden["kept_labels"]), int(golden["n_ins"]))
    assert sorted(groups.flatten().tolist()) == golden["keep_mask"].nonzero().flatten().tolist()
    for rows in groups:
        assert len(golden["labels"][rows].unique()) == 1


def by_appearance(groups: torch.Tensor, case: dict) -> torch.Tensor:
    """Groups in the order in which their clusters appear, as the golden files hold them."""
    order = {int(label): place for place, label in enumerate(case["kept_labels"])}
    return torch.stack(sorted(groups, key=lambda rows: order[int(case["labels"][rows[0]])]))


def test_pairs_and_terms_of_each_cluster(golden):
    feats, tau = F.normalize(golden["feats"].double()), float(golden["tau"])
    pairs = sparse_pairs(feats, by_appearance(full_groups(golden["labels"]), golden))
    near = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(pairs.hardest, golden["s_hard"], **near)
    torch.testing.assert_close(pairs.easiest, golden["s_easy"], **near)
    torch.testing.assert_close(pairs.negatives, golden["s_neg"], **near)
    torch.testing.assert_close(torch.sigmoid((pairs.hardest - pairs.easiest) / tau), golden["weight"], **near)
    torch.testing.assert_close(composite_contrast(pairs, tau), golden["cscl_per_class"], **near)
    torch.testing.assert_close(weighted_contrast(pairs, tau), golden["wscl_per_class"], **near)


@pytest.mark.parametrize("name", VARIANTS)
def test_value_and_gradient_of_the_released_loss(golden, name):
    feats = golden["feats"].double().requires_grad_()
    value = loss_of(golden, *VARIANTS[name])(F.normalize(feats), golden["labels"])
    value.backward()
    assert value.item() == pytest.approx(float(golden[name.lstrip("_") or "loss"]), rel=1e-9)
    expected = golden[f"grad{name}"]
    torch.testing.assert_close(feats.grad, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    assert not feats.grad[~golden["keep_mask"]].any()


def test_single_precision(golden):
    feats = golden["feats"].requires_grad_()
    value = loss_of(golden)(F.normalize(feats), golden["labels"])
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(float(golden["loss_f32"]), rel=1e-5)
    expected = golden["grad_f32"]
    torch.testing.assert_close(feats.grad, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_order_of_the_batch_does_not_matter(golden):
    """The released loss reads labels only if clusters are incomplete; here they always count."""
    order = torch.randperm(len(golden["labels"]), generator=torch.Generator().manual_seed(0))
    value = loss_of(golden)(F.normalize(golden["feats"].double())[order], golden["labels"][order])
    assert value.item() == pytest.approx(float(golden["loss"]), rel=1e-9)


# a plain loop and the closed form


def batch(sizes: tuple[int, ...], dim: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.tensor([7, 3, 9, 1, 4][: len(sizes)]), torch.tensor(sizes))
    mixed = torch.randperm(len(labels), generator=generator)
    return torch.randn(len(labels), dim, dtype=torch.float64, generator=generator), labels[mixed]


def selected(unit: np.ndarray, labels: list[int], size: int) -> list[tuple]:
    """For each full cluster the index pairs: hardest, easiest, and the `size` most similar negatives."""
    kept = [k for k in sorted(set(labels)) if labels.count(k) == size]
    result = []
    for k in kept:
        own = [i for i, label in enumerate(labels) if label == k]
        other = [j for j, label in enumerate(labels) if label != k and label in kept]
        within = sorted(itertools.combinations(own, 2), key=lambda p: unit[p[0]] @ unit[p[1]])
        across = sorted(itertools.product(own, other), key=lambda p: -(unit[p[0]] @ unit[p[1]]))
        result.append((within[0], within[-1], across[:size]))
    return result


def closed_form(feats: np.ndarray, labels: list[int], size: int, tau: float, composite: float, weighted: float):
    """Value and gradient with respect to the rows before unit length, written out for each pair."""
    norm = np.linalg.norm(feats, axis=1, keepdims=True)
    unit = feats / norm
    groups = selected(unit, labels, size)
    value, grad = 0.0, np.zeros_like(feats)

    def push(pair, slope):
        grad[pair[0]] += slope * unit[pair[1]]
        grad[pair[1]] += slope * unit[pair[0]]

    for hard, easy, negatives in groups:
        a, b = (unit[i] @ unit[j] / tau for i, j in (hard, easy))
        n = [unit[i] @ unit[j] / tau for i, j in negatives]
        z = sum(map(math.exp, n))
        sigma = 2 * math.exp(a) * math.exp(b) / (math.exp(a) + math.exp(b))
        w = math.exp(a) / (math.exp(a) + math.exp(b))
        q, r, term = z / (sigma + z), z / (math.exp(a) + z), math.log(1 + z / math.exp(a))
        value += composite * math.log(1 + z / sigma) + weighted * w * term
        push(hard, composite * -q * (1 - w) + weighted * (-w * r + w * (1 - w) * term))
        push(easy, composite * -q * w - weighted * w * (1 - w) * term)
        for pair, logit in zip(negatives, n, strict=True):
            push(pair, (composite * q + weighted * w * r) * math.exp(logit) / z)
    grad = (grad - (grad * unit).sum(1, keepdims=True) * unit) / norm
    return value / len(groups), grad / (tau * len(groups))


@pytest.mark.parametrize("weights", [(0.25, 0.25), (1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize(("sizes", "size"), [((4, 4, 4, 4), 4), ((3, 2, 3, 1, 3), 3), ((2, 2, 2), 2), ((5, 5), 5)])
def test_value_and_gradient_equal_the_closed_form(sizes, size, weights):
    feats, labels = batch(sizes)
    value, grad = closed_form(feats.numpy(), labels.tolist(), size, 0.05, *weights)
    loss = SparseContrastiveLoss(temperature=0.05, composite=weights[0], weighted=weights[1])
    found = loss(F.normalize(feats.requires_grad_()), labels)
    found.backward()
    assert found.item() == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(feats.grad, torch.from_numpy(grad), rtol=1e-8, atol=1e-10)


def test_gradcheck():
    feats, labels = batch((3, 3, 3, 2))
    loss = SparseContrastiveLoss(temperature=0.2)
    assert torch.autograd.gradcheck(lambda x: loss(F.normalize(x), labels), (feats.requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype):
    feats, labels = batch((4, 4, 4))
    feats = F.normalize(feats)
    loss = SparseContrastiveLoss(temperature=0.01)  # exp(1 / 0.01) is more than float16 and float32 hold
    found = loss(feats.to(dtype), labels)
    assert found.dtype == torch.float32
    expected, _ = closed_form(feats.to(dtype).double().numpy(), labels.tolist(), 4, 0.01, 0.25, 0.25)
    # unit length is lost in half precision: the loop normalises again
    assert found.item() == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("sizes", [(6,), (1, 1, 1), (4, 2, 1)])
def test_fewer_than_two_full_clusters_cost_nothing_and_give_no_gradient(sizes):
    feats, labels = batch(sizes)
    value = SparseContrastiveLoss()(F.normalize(feats.requires_grad_()), labels)
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(feats.grad, torch.zeros_like(feats))


def test_more_singles_than_full_clusters_do_not_matter():
    labels = torch.tensor([0, 5, 5, 5, 6, 7, 8, 9, 2, 2, 2, 1])
    assert full_groups(labels).tolist() == [[8, 9, 10], [1, 2, 3]]


@pytest.mark.parametrize(("sizes", "shape"), [((2, 2, 2, 5, 5), (2, 5)), ((4, 4, 2, 2, 2, 2), (4, 2))])
def test_images_decide_which_number_is_full_and_of_two_the_smaller(sizes, shape):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    assert full_groups(labels).shape == shape


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": 0.0}, r"TEMPERATURE is 0\.0"),
        ({"composite": -1.0}, r"COMPOSITE is -1\.0"),
        ({"weighted": -0.5}, r"WEIGHTED is -0\.5"),
    ],
)
def test_keys_out_of_range(keys, message):
    with pytest.raises(ValueError, match=message):
        SparseContrastiveLoss(**keys)


# configs


def test_the_method_is_pplr_with_the_sparse_loss_in_place_of_the_triplet():
    cfg = load_config(CONFIGS / "synthetic.yaml")
    assert cfg.MODEL.NAME == "PPLR"
    assert {name: section.NAME for name, section in cfg.MODEL.LOSSES.items()} == {
        "global": "RefinedLabelLoss",
        "parts": "AgreementSmoothingLoss",
        "sparse": "SparseContrastiveLoss",
    }
    net = build_model(cfg, 8)
    assert net.encoder.head.pool.kind == net.encoder.head.part_pool.kind == "gem"
    assert net.encoder.head.pool.p is not net.encoder.head.part_pool.p


@pytest.mark.parametrize("name", ["omniglot", "grocery", "omniglot_baseline", "grocery_baseline"])
def test_real_set_configs_build_at_the_size_of_the_comparison(name):
    cfg = load_config(CONFIGS / f"{name}.yaml", ["INPUT.SIZE=[48,48]", "MODEL.BACKBONE.WIDTH=16"])
    assert ("sparse" in cfg.MODEL.LOSSES) != name.endswith("baseline")
    found = build_model(cfg, 8).eval().extract(torch.zeros(2, 3, 48, 48, dtype=torch.uint8))
    assert found["parts"].shape == (2, 3, 128)


def test_a_short_run_sees_full_clusters(tiny):
    recipe = [*tiny, "PSEUDO_LABELS.K1=8", "PSEUDO_LABELS.K2=3", "PSEUDO_LABELS.MIN_SAMPLES=2"]
    trainer = DefaultTrainer(load_config(CONFIGS / "synthetic.yaml", [*recipe, "MODEL.BACKBONE.WIDTH=4"]))
    trainer.train()
    lines = [json.loads(line) for line in (trainer.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss_sparse"] > 0.1 for line in lines)
