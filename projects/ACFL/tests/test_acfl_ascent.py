"""Hard person features and hard images against reference values and against the plain definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.projects.ACFL.ascent import SPHERES, FeatureAscent, hard_images
from fastreid_uns.projects.ACFL.losses import class_loss, cluster_distribution, divergence
from fastreid_uns.projects.ACFL.tests.acfl_golden import FEATURES, ON_SPHERE, golden


def ascent_of(data, **change) -> FeatureAscent:
    numbers = {"steps": int(data["par_V"]), "rate_positive": float(data["par_eta1"])}
    return FeatureAscent(**{**numbers, "rate_negative": float(data["par_eta2"]), **change})


def logits_of(data, feats, **change):
    easy = feats @ data["in_C"].T
    tau = float(data["par_tau"])
    return ascent_of(data, **change)(feats, data["in_C"], easy, data["in_y"], tau).products(feats, easy) / tau


def loss_of(data, feats, **change):
    return F.cross_entropy(logits_of(data, feats, **change), data["in_y"], reduction="none")


def assert_close(found, expected, tolerance=1e-10):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FEATURES)
def test_reference_of_the_plain_ascent(name):
    data = golden(name)
    raw = data["in_u"].requires_grad_()
    feats = F.normalize(raw)
    feats.retain_grad()
    easy = feats @ data["in_C"].T
    tau = float(data["par_tau"])
    found = ascent_of(data)(feats, data["in_C"], easy, data["in_y"], tau)
    assert not found.shift.requires_grad
    assert_close(found.shift, data["out_alpha"])
    assert_close(found.scale, torch.ones_like(found.scale))
    assert_close(found.products(feats, easy) / tau, data["out_zV"])
    stars = found.scale[..., None] * data["in_C"] + found.shift[..., None] * feats[:, None]
    assert_close(stars, data["out_Cstar"])
    assert_close(class_loss(easy, data["in_y"], tau), data["out_loss_easy"])
    loss = class_loss(found.products(feats, easy), data["in_y"], tau)
    assert_close(loss, data["out_loss"])
    loss.mean().backward()
    assert_close(feats.grad, data["out_grad_q"])
    assert_close(raw.grad, data["out_grad_u"])


def test_reference_of_features_that_are_no_unit_vectors():
    data = golden("acfl_hpf_05_rawq")
    feats = data["in_q"].requires_grad_()
    assert_close(logits_of(data, feats), data["out_zV"])
    loss = loss_of(data, feats)
    assert_close(loss, data["out_loss"])
    loss.mean().backward()
    assert_close(feats.grad, data["out_grad_q"])


@pytest.mark.parametrize("name", FEATURES)
def test_reference_of_one_side(name):
    data = golden(name)
    feats = F.normalize(data["in_u"])
    assert_close(loss_of(data, feats, hard="positive"), data["out_loss_posonly"])
    assert_close(loss_of(data, feats, hard="negative"), data["out_loss_negonly"])
    assert_close(loss_of(data, feats, hard="none"), data["out_loss_easy"])


@pytest.mark.parametrize("name", FEATURES)
def test_reference_of_the_sphere(name):
    data = golden(name)
    feats = F.normalize(data["in_u"])
    assert_close(logits_of(data, feats, sphere="end"), data["var_finalrenorm_logits"])
    assert_close(loss_of(data, feats, sphere="end"), data["var_finalrenorm_loss"])
    if name in ON_SPHERE:
        assert_close(logits_of(data, feats, sphere="step"), data["var_sphere_logits"])
        assert_close(loss_of(data, feats, sphere="step"), data["var_sphere_loss"])
        assert_close(logits_of(data, feats, sphere="tangent"), data["var_sphere_tangent_logits"])
        assert_close(loss_of(data, feats, sphere="tangent"), data["var_sphere_tangent_loss"])


def copies_by_autograd(feats, centroids, labels, temperature, ascent: FeatureAscent):
    """(B,K,D): a private copy of all centroids for each query, moved by autograd; the definition."""
    stars = centroids.expand(len(feats), -1, -1).clone()
    if ascent.sphere in ("step", "tangent"):
        stars = F.normalize(stars, dim=2)
    rates = torch.full(stars.shape[:2], ascent.rate_negative, dtype=stars.dtype)
    rates[torch.arange(len(feats)), labels] = ascent.rate_positive
    for _ in range(ascent.steps):
        stars = stars.detach().requires_grad_()
        read = F.normalize(stars, dim=2) if ascent.sphere == "tangent" else stars
        logits = torch.einsum("bd,bkd->bk", feats, read) / temperature
        (slope,) = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), stars)
        stars = stars.detach() + rates[..., None] * slope
        if ascent.sphere in ("step", "tangent"):
            stars = F.normalize(stars, dim=2)
    return F.normalize(stars, dim=2) if ascent.sphere == "end" else stars


@pytest.mark.parametrize("sphere", SPHERES)
@pytest.mark.parametrize("length", [1.0, 3.0])
@pytest.mark.parametrize("rates", [1.0, 10.0])
def test_recurrence_equals_explicit_copies(sphere, length, rates):
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(30, 16, dtype=torch.float64, generator=generator)
    centroids = centroids / centroids.norm(dim=1, keepdim=True) * torch.linspace(0.6, 1.0, 30)[:, None]
    labels = torch.arange(12) % 30
    noise = 0.2 * torch.randn(12, 16, dtype=torch.float64, generator=generator)
    feats = (length * F.normalize(centroids[labels] + noise)).requires_grad_()
    temperature = 0.1 * length
    ascent = FeatureAscent("both", sphere, 7, 0.002 * rates, 0.01 * rates)

    stars = copies_by_autograd(feats.detach(), centroids, labels, temperature, ascent)
    expected = torch.einsum("bd,bkd->bk", feats, stars) / temperature
    (slope,) = torch.autograd.grad(F.cross_entropy(expected, labels), feats)

    easy = feats @ centroids.T
    found = ascent(feats, centroids, easy, labels, temperature)
    logits = found.products(feats, easy) / temperature
    assert_close(logits, expected, 1e-9)
    assert_close(found.scale[..., None] * centroids + found.shift[..., None] * feats.detach()[:, None], stars, 1e-9)
    assert_close(torch.autograd.grad(F.cross_entropy(logits, labels), feats)[0], slope, 1e-9)


def test_two_steps_in_plain_floats():
    from math import exp

    # q = (1, 0) and three centroids whose products with q are 0.5 (own), 0.4 and 0.0
    products, tau, rates = [0.5, 0.4, 0.0], 0.2, [0.01, 0.02, 0.02]
    for _ in range(2):
        powers = [exp(p / tau) for p in products]
        slopes = [power / sum(powers) - own for power, own in zip(powers, (1, 0, 0), strict=True)]
        products = [p + rate * slope / tau for p, rate, slope in zip(products, rates, slopes, strict=True)]
    feats = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    centroids = torch.tensor([[0.5, 0.5], [0.4, -0.6], [0.0, 1.0]], dtype=torch.float64)
    easy = feats @ centroids.T
    ascent = FeatureAscent("both", "none", 2, 0.01, 0.02)
    found = ascent(feats, centroids, easy, torch.tensor([0]), tau).products(feats, easy)
    assert_close(found[0], torch.tensor(products, dtype=torch.float64), 1e-12)
    assert found[0, 0] < 0.5
    assert found[0, 1] > 0.4


def test_the_size_of_the_batch_does_not_change_the_ascent():
    data = golden("acfl_hpf_02_paper")
    feats = F.normalize(data["in_u"])
    alone = [logits_of({**data, "in_y": data["in_y"][i : i + 1]}, feats[i : i + 1]) for i in range(len(feats))]
    assert_close(torch.cat(alone), logits_of(data, feats), 1e-12)


def test_single_precision_stays_near_double():
    data = golden("acfl_hpf_02_paper")
    feats = F.normalize(data["in_u"])
    narrow = {**data, "in_C": data["in_C"].float()}
    torch.testing.assert_close(logits_of(narrow, feats.float()).double(), data["out_zV"], rtol=0, atol=2e-4)


def test_one_centroid_stays_where_it_is():
    feats = F.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(0)))
    centroid = F.normalize(torch.ones(1, 4))
    found = FeatureAscent()(feats, centroid, feats @ centroid.T, torch.zeros(3, dtype=torch.int64), 0.05)
    assert found.shift.abs().max() == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hard": "all"}, r"MODEL\.HARD: 'all' is unknown; accepted: both, positive, negative, none"),
        ({"sphere": "unit"}, r"MODEL\.SPHERE: 'unit' is unknown"),
        ({"steps": -1}, r"MODEL\.FEATURE_STEPS is -1; 0 or more is accepted"),
        ({"rate_positive": -0.1}, r"MODEL\.RATE_POSITIVE is -0\.1"),
        ({"rate_negative": float("nan")}, r"MODEL\.RATE_NEGATIVE is nan"),
    ],
)
def test_wrong_values_of_the_feature_ascent(change, message):
    with pytest.raises(ValueError, match=message):
        FeatureAscent(**change)


def encoder_of(data, parameters=()):
    first, second = parameters or (data["in_W1"], data["in_W2"])
    return lambda images: F.normalize(torch.tanh(images.flatten(1) @ first) @ second)


def divergence_to(data, direction, encode):
    tau = float(data["par_tau"])
    query = cluster_distribution(data["out_q_i"] @ data["in_C"].T, tau)
    return lambda images: divergence(query, cluster_distribution(encode(images) @ data["in_C"].T, tau), direction)


@pytest.mark.parametrize("name", ["acfl_hpi_01", "acfl_hpi_02_small"])
@pytest.mark.parametrize(("direction", "key"), [("forward", "ij"), ("reverse", "ji")])
def test_reference_of_hard_images(name, direction, key):
    data = golden(name)
    encode = encoder_of(data)
    assert_close(encode(data["in_xi"]), data["out_q_i"])
    loss = divergence_to(data, direction, encode)
    for steps in range(int(data["par_Z"]) + 1):
        images = hard_images(data["in_xj"], loss, steps=steps, rate=float(data["par_eta3"]))
        assert_close(images, data[f"out_traj_{key}"][steps], 1e-8)
        assert_close(loss(images), data[f"out_kl_{key}"][steps], 1e-8)
        if steps < int(data["par_Z"]):
            slope = torch.autograd.grad(loss(images.requires_grad_()).sum(), images)[0]
            assert_close(slope.flatten(1).norm(dim=1), data[f"out_gnorm_{key}"][steps], 1e-8)


def test_each_image_takes_a_step_of_one_length_whatever_the_others_do():
    data = golden("acfl_hpi_01")
    loss = divergence_to(data, "forward", encoder_of(data))
    moved = hard_images(data["in_xj"], loss, steps=1, rate=0.7) - data["in_xj"]
    assert_close(moved.flatten(1).norm(dim=1), torch.full((5,), 0.7, dtype=torch.float64), 1e-12)


def test_steps_are_measured_in_normalised_pixels():
    data = golden("acfl_hpi_01")
    std = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64).view(1, 3, 1, 1)
    loss = divergence_to(data, "forward", encoder_of(data))
    normalised = hard_images(data["in_xj"], loss, steps=3, rate=1.0)
    raw = hard_images(data["in_xj"] * std, lambda images: loss(images / std), steps=3, rate=1.0, std=std)
    assert_close(raw / std, normalised, 1e-10)


def test_images_and_parameters_stay_as_they_were():
    data = golden("acfl_hpi_01")
    parameters = [data["in_W1"].clone().requires_grad_(), data["in_W2"].clone().requires_grad_()]
    images = data["in_xj"].clone()
    loss = divergence_to(data, "forward", encoder_of(data, parameters))
    with torch.no_grad():
        moved = hard_images(images, loss, steps=2, rate=1.0)
    assert torch.equal(images, data["in_xj"])
    assert not images.requires_grad
    assert not moved.requires_grad
    assert [parameter.grad for parameter in parameters] == [None, None]


def test_an_image_without_slope_stays():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([0.0, 1.0])
    moved = hard_images(images, lambda x: weight * x.flatten(1).sum(1), steps=3, rate=1.0)
    assert torch.equal(moved[0], images[0])
    torch.testing.assert_close(moved[1], images[1] + 3 / 48**0.5)


def test_no_steps_give_the_image():
    images = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hard_images(images, lambda x: x.sum((1, 2, 3)), steps=0, rate=1.0), images)
