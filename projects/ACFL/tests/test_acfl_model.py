"""The model: what it pays for, what it leaves alone, and which values it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastreid_uns.modeling.losses import CrossEntropyLoss, LossSet
from fastreid_uns.modeling.memory import ClusterMemory
from fastreid_uns.modeling.norm import frozen_statistics
from fastreid_uns.projects.ACFL.ascent import FeatureAscent, hard_images
from fastreid_uns.projects.ACFL.losses import next_of_cluster
from fastreid_uns.projects.ACFL.model import ACFL
from fastreid_uns.projects.ACFL.tests.acfl_toy import INDEX, LABELS, TAU, batch, build, features


def test_plain_contrast_in_plain_tensors():
    model = build(hard="none", instance="none")
    feats = features(model, batch().views[0])
    means = torch.stack([model.memory.features[a == LABELS].mean(0) for a in range(3)])
    outputs = model(batch())
    assert set(outputs) == {"loss_class", "accuracy"}
    logits = feats @ means.T / TAU
    torch.testing.assert_close(outputs["loss_class"], F.cross_entropy(logits, LABELS[INDEX]))
    assert outputs["accuracy"] == (logits.argmax(1) == LABELS[INDEX]).float().mean()


def test_features_are_hard_before_they_are_paid_for():
    easy, hard = (build(hard=word, instance="none")(batch())["loss_class"] for word in ("none", "both"))
    model = build()
    feats = features(model, batch().views[0])
    means = model.memory.centroids
    stars = means.repeat(len(feats), 1, 1)
    ascent = FeatureAscent()
    for _ in range(ascent.steps):  # algorithm 2
        slope = (torch.einsum("bd,bkd->bk", feats, stars) / TAU).softmax(1) - F.one_hot(LABELS[INDEX])
        rates = torch.where(F.one_hot(LABELS[INDEX]) == 1, ascent.rate_positive, ascent.rate_negative)
        stars = stars + (rates * slope / TAU)[..., None] * feats[:, None]
    expected = F.cross_entropy(torch.einsum("bd,bkd->bk", feats, stars) / TAU, LABELS[INDEX])
    torch.testing.assert_close(hard, expected, rtol=1e-4, atol=1e-4)
    assert hard > easy


@pytest.mark.parametrize("direction", ["forward", "reverse", "symmetric"])
def test_easy_partner_of_the_batch(direction):
    model = build(image_steps=0, direction=direction)
    feats = features(model, batch().views[0])
    rows = torch.tensor([1, 6, 3, 7, 5, 4, 0, 2])  # the next of the cluster, around the end
    logs = (feats @ model.memory.centroids.T / TAU).log_softmax(1)
    there, back = (
        F.kl_div(b, a, log_target=True, reduction="batchmean") for a, b in ((logs, logs[rows]), (logs[rows], logs))
    )
    expected = {"forward": there, "reverse": back, "symmetric": (there + back) / 2}[direction]
    outputs = model(batch())
    torch.testing.assert_close(outputs["loss_instance"], expected)
    assert outputs["partners"] == 1


def test_distance_to_an_easy_partner():
    model = build(image_steps=0, instance="distance")
    feats = features(model, batch().views[0])
    expected = (feats - feats[[1, 6, 3, 7, 5, 4, 0, 2]]).pow(2).sum(1).mean()
    torch.testing.assert_close(model(batch())["loss_instance"], expected)


@pytest.mark.parametrize("instance", ["kl", "distance"])
def test_hard_images_are_harder_by_the_definition(instance):
    easy = build(instance=instance, image_steps=0)(batch())["loss_instance"]
    model = build(instance=instance, image_rate=0.5)
    feats, means = features(model, batch().views[0]), model.memory.centroids
    logs = (feats @ means.T / TAU).log_softmax(1)
    images = (batch().views[0] - model.encoder.mean) / model.encoder.std
    images = images[next_of_cluster(LABELS[INDEX], INDEX)]

    def losses(normalised):
        with frozen_statistics(model.encoder):
            other = model.encoder(normalised * model.encoder.std + model.encoder.mean).feats
        if instance == "distance":
            return 2 - 2 * (feats * other).sum(1)
        return F.kl_div((other @ means.T / TAU).log_softmax(1), logs, log_target=True, reduction="none").sum(1)

    moved = hard_images(images, losses, steps=3, rate=0.5)  # normalised pixels, as eq. 4 has them
    found = model(batch())["loss_instance"]
    torch.testing.assert_close(found, losses(moved).mean(), rtol=1e-3, atol=1e-3)
    assert found > easy


PAIRS = torch.tensor([0, 1, 4, 3, 6, 7, 2, 1])


@pytest.mark.parametrize("partner", ["batch", "drawn"])
@pytest.mark.parametrize("steps", [0, 1])
def test_both_images_of_a_pair_get_the_gradient(partner, steps):
    """A step of length 0 leaves the image where it is, and so the gradient that two plain passes have."""
    data = batch(PAIRS if partner == "drawn" else INDEX)
    keys = {"partner": partner, "hard": "none", "image_steps": steps, "image_rate": 0.0}

    def plain(stopped: str) -> list[torch.Tensor]:
        model, images = build(**keys), data.views[0]
        with frozen_statistics(model.encoder):
            if partner == "drawn":
                first, second = model.encoder(images[0::2]).feats, model.encoder(images[1::2]).feats
            else:
                first = model.encoder(images).feats
                rows = next_of_cluster(data.labels, data.index)
                second = model.encoder(images[rows]).feats if steps else first[rows]
        first, second = (feats.detach() if side == stopped else feats for side, feats in (("q", first), ("p", second)))
        logs = [(feats @ model.memory.centroids.T / TAU).log_softmax(1) for feats in (first, second)]
        F.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean").backward()
        return [parameter.grad for parameter in model.encoder.parameters() if parameter.requires_grad]

    model = build(**keys)
    model(data)["loss_instance"].backward()
    found = [parameter.grad for parameter in model.encoder.parameters() if parameter.requires_grad]
    torch.testing.assert_close(found, plain(""), rtol=1e-3, atol=1e-5)
    for side in ("q", "p"):
        assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(found, plain(side), strict=True))


def test_the_ascent_asks_for_no_gradient_of_parameters(monkeypatch):
    model, asked = build(image_steps=3), []
    forward = model.encoder.forward

    def noted(*arguments):
        asked.append(any(parameter.requires_grad for parameter in model.encoder.parameters()))
        return forward(*arguments)

    monkeypatch.setattr(model.encoder, "forward", noted)
    model(batch())
    assert asked == [True, False, False, False, True]


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_the_ascent_leaves_no_trace(norm):
    model = build(image_norm=norm)
    other = build(instance="none")
    asks = [parameter.requires_grad for parameter in model.parameters()]
    model(batch()), other(batch())
    assert [parameter.grad for parameter in model.parameters()] == [None] * len(asks)
    assert [parameter.requires_grad for parameter in model.parameters()] == asks
    assert all(module.training for module in model.modules())
    for (name, value), (_, wanted) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(value, wanted), name


def test_image_norm_decides_by_which_statistics_the_hard_image_is_seen():
    model = build(image_steps=1, image_rate=0.0, image_norm="running")
    feats = features(model, batch().views[0])
    seen = copy.deepcopy(model)
    seen.encoder(batch().views[0])  # the running statistics have learnt from the queries
    other = features(seen.eval(), batch().views[0])[next_of_cluster(LABELS[INDEX], INDEX)]
    first, second = ((q @ model.memory.centroids.T / TAU).log_softmax(1) for q in (feats, other))
    expected = F.kl_div(second, first, log_target=True, reduction="batchmean")
    torch.testing.assert_close(model(batch())["loss_instance"], expected)


def test_the_memory_is_written_after_it_was_read():
    model = build()
    before = model.memory.features.clone()
    feats = features(model, batch().views[0])
    model(batch())
    expected = before.index_copy(0, INDEX, feats)
    torch.testing.assert_close(model.memory.features, expected)
    model.eval()(batch())
    torch.testing.assert_close(model.memory.features, expected)


def test_drawn_partners_are_every_second_row():
    index, pairs = PAIRS, batch(PAIRS)
    model = build(partner="drawn", image_steps=0, hard="none")
    queries, partners = features(model, pairs.views[0][0::2]), features(model, pairs.views[0][1::2])
    first, second = ((q @ model.memory.centroids.T / TAU).log_softmax(1) for q in (queries, partners))
    before = model.memory.features.clone()
    outputs = model(pairs)
    torch.testing.assert_close(
        outputs["loss_instance"], F.kl_div(second, first, log_target=True, reduction="batchmean")
    )
    torch.testing.assert_close(outputs["loss_class"], F.nll_loss(first, LABELS[index[0::2]]))
    torch.testing.assert_close(model.memory.features, before.index_copy(0, index[0::2], queries))


def test_rows_that_are_no_pairs_are_refused_once_asked_for():
    with pytest.raises(ValueError, match=r"PARTNER is drawn.*Set DATALOADER\.SAMPLER\.NAME to PartnerSampler"):
        build(partner="drawn")(batch())


def test_mining_takes_the_hardest_rows_and_partners():
    model = build(mining=True, image_steps=0)
    feats = features(model, batch().views[0])
    labels = LABELS[INDEX]
    products = torch.zeros(8, 3)
    for i in range(8):
        for a in range(3):
            members = model.memory.features[a == LABELS] @ feats[i]
            products[i, a] = members.min() if a == labels[i] else members.max()
    logs = (feats @ model.memory.centroids.T / TAU).log_softmax(1)
    similar = feats @ feats.T
    rows = [
        min((j for j in range(8) if j != i and labels[j] == labels[i]), key=lambda j: similar[i, j]) for i in range(8)
    ]
    easy = feats @ model.memory.centroids.T
    own = F.one_hot(labels, 3) == 1
    outputs = model(batch())
    torch.testing.assert_close(outputs["loss_class"], F.cross_entropy(products / TAU, labels))
    torch.testing.assert_close(
        outputs["loss_instance"], F.kl_div(logs[rows], logs, log_target=True, reduction="batchmean")
    )
    for hard, chosen in (("positive", own), ("negative", ~own), ("none", own & False)):
        expected = F.cross_entropy(torch.where(chosen, products, easy) / TAU, labels)
        found = build(mining=True, image_steps=0, hard=hard)(batch())["loss_class"]
        torch.testing.assert_close(found, expected)


def test_losses_under_autocast_are_near_those_in_single_precision():
    exact = build()(batch())
    with torch.autocast("cpu", torch.bfloat16):
        found = build(image_rate=1.0)(batch())
    assert found["loss_class"].dtype == torch.float32
    torch.testing.assert_close(found["loss_class"], exact["loss_class"], rtol=0.1, atol=0.1)
    assert torch.isfinite(found["loss_instance"])


def test_a_batch_of_one_cluster_is_finite():
    model = build()
    index = torch.tensor([0, 1, 2, 0])
    outputs = model(batch(index))
    sum(outputs[name] for name in ("loss_class", "loss_instance")).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


class Sizes(TorchDispatchMode):
    """The largest tensor that is made, and operations for which a host would wait for its device."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "bincount", "equal", "_unique2", "masked_select"):
            self.waits.append(name)
        return result


def test_no_copy_of_the_centroids_is_ever_made():
    feats, centroids = (F.normalize(torch.randn(n, 64, generator=torch.Generator().manual_seed(0))) for n in (16, 40))
    easy = feats @ centroids.T
    labels = torch.arange(16)
    for sphere in ("none", "step", "tangent", "end"):
        with Sizes() as sizes:
            FeatureAscent(sphere=sphere)(feats, centroids, easy, labels, TAU).products(feats, easy)
        assert sizes.largest <= 40 * 64  # the centroids themselves; copies would be 16 * 40 * 64


@pytest.mark.parametrize("keys", [{}, {"mining": True}, {"image_norm": "running"}])
def test_a_step_never_waits_for_the_device(keys):
    model = build(**keys)
    data = batch()
    with Sizes() as sizes:
        outputs = model(data)
        (outputs["loss_class"] + outputs["loss_instance"]).backward()
    assert sizes.waits == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"instance": "l2"}, r"MODEL\.INSTANCE: 'l2' is unknown; accepted: kl, distance, none"),
        ({"direction": "back"}, r"MODEL\.DIRECTION: 'back' is unknown"),
        ({"partner": "pairs"}, r"MODEL\.PARTNER: 'pairs' is unknown"),
        ({"image_norm": "eval"}, r"MODEL\.IMAGE_NORM: 'eval' is unknown; accepted: batch, running"),
        ({"image_steps": -1}, r"MODEL\.IMAGE_STEPS is -1; 0 or more is accepted"),
        ({"image_rate": -1.0}, r"MODEL\.IMAGE_RATE is -1\.0"),
        ({"hard": "hardest"}, r"MODEL\.HARD: 'hardest' is unknown"),
        ({"mining": True, "partner": "drawn"}, r"MODEL\.MINING takes its partners from the batch"),
    ],
)
def test_wrong_values(keys, message):
    with pytest.raises(ValueError, match=message):
        build(**keys)


def test_another_memory_or_further_losses_are_refused():
    parts = build()
    with pytest.raises(ValueError, match=r"MODEL\.MEMORY is ClusterMemory.*Set MODEL\.MEMORY\.NAME to ReplacedMemory"):
        ACFL(parts.encoder, ClusterMemory(8), LossSet({}), 10)
    losses = LossSet({"contrast": (CrossEntropyLoss(), 1.0)})
    with pytest.raises(ValueError, match=r"MODEL\.LOSSES names contrast.*Drop each entry with null"):
        ACFL(parts.encoder, copy.deepcopy(parts.memory), losses, 10)
