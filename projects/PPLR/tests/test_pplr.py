"""The parts of PPLR against plain loops, and its model on clusters made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.projects.PPLR.labels import AgreementLabels, cross_agreement
from fastreid_uns.projects.PPLR.losses import (
    AgreementSmoothingLoss,
    PartCrossEntropyLoss,
    RefinedLabelLoss,
    UnnormalizedTripletLoss,
    refined_targets,
)
from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels
from fastreid_uns.pseudo_labels.search.exact import nearest_neighbours
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"
B, P, K, D = 6, 3, 5, 8
LATE = 9


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def values() -> dict[str, torch.Tensor]:
    return {
        "logits": rand(B, K, seed=1),
        "part_logits": 2 * rand(B, P, K, seed=2),
        "agreement": rand(B, P, seed=3).sigmoid(),
        "labels": torch.tensor([0, 3, 3, 1, 4, 0]),
    }


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def targets_by_loop(part_logits, agreement, labels, beta) -> list[list[float]]:
    rows = []
    for i, label in enumerate(labels.tolist()):
        weights = softmax(agreement[i].tolist())
        predictions = [softmax(part_logits[i, p].tolist()) for p in range(P)]
        rows.append(
            [
                beta * (a == label) + (1 - beta) * sum(weights[p] * predictions[p][a] for p in range(P))
                for a in range(part_logits.shape[2])
            ]
        )
    return rows


# cross agreement


def test_agreement_of_sets_worked_by_hand():
    """Six points on a line, two nearest each: by the part, the images stand in another order."""
    whole = torch.tensor([0.0, 1.0, 2.1, 3.3, 4.6, 6.0])[:, None]
    part = whole[torch.tensor([0, 1, 5, 2, 3, 4])]  # image 2 at 6.0, image 3 at 2.1, ...
    # two nearest by the whole: 0 {1,2}, 1 {0,2}, 2 {1,3}, 3 {2,4}, 4 {3,5}, 5 {4,3}
    # by the part: 0 {1,3}, 1 {0,3}, 2 at 6.0 {5,4}, 3 at 2.1 {1,4}, 4 at 3.3 {3,5}, 5 at 4.6 {4,2}
    # shared: {1}, {0}, none, {4}, {3,5}, {4}
    expected = torch.tensor([1 / 3, 1 / 3, 0.0, 1 / 3, 1.0, 1 / 3])
    found = cross_agreement(whole, torch.stack([whole, part], dim=1), 2)
    torch.testing.assert_close(found, torch.stack([torch.ones(6), expected], dim=1))


def test_agreement_equals_sets_of_a_full_sort():
    feats, parts = F.normalize(rand(40, 6, seed=4)).float(), F.normalize(rand(40, P, 6, seed=5), dim=2).float()
    found = cross_agreement(feats, parts, 7)

    def nearest(rows: torch.Tensor, i: int) -> set[int]:
        order = (rows.double() - rows[i].double()).square().sum(1).argsort().tolist()
        return set([j for j in order if j != i][:7])

    for i in range(40):
        own = nearest(feats, i)
        for p in range(P):
            other = nearest(parts[:, p], i)
            assert found[i, p].item() == pytest.approx(len(own & other) / len(own | other), rel=1e-6)


def test_agreement_does_not_depend_on_the_order_of_images():
    feats, parts = rand(30, 6, seed=6).float(), rand(30, P, 6, seed=7).float()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(8))
    expected = cross_agreement(feats, parts, 5)[order]
    torch.testing.assert_close(cross_agreement(feats[order], parts[order], 5), expected)


def test_doubles_of_an_image_are_neighbours_and_the_image_is_not():
    feats = torch.tensor([[0.0], [0.0], [5.0], [5.0]])
    found = cross_agreement(feats, feats[:, None], 1)
    torch.testing.assert_close(found, torch.ones(4, 1))


def test_fewer_images_than_neighbours_agree_on_all():
    feats = rand(4, 3).float()
    torch.testing.assert_close(cross_agreement(feats, rand(4, 2, 3, seed=1).float(), 20), torch.ones(4, 2))


def test_one_image_has_no_neighbours():
    with pytest.raises(ValueError, match="1 image has no neighbours"):
        cross_agreement(torch.ones(1, 2), torch.ones(1, 2, 2))


def test_labels_are_those_of_dbscan_with_the_score_beside():
    identities = torch.arange(30) % 5
    feats = F.normalize(rand(5, 8, seed=1)[identities] + 0.05 * rand(30, 8, seed=2)).float()
    parts = F.normalize(rand(30, P, 8, seed=3), dim=2).float()
    cameras = torch.zeros(30, dtype=torch.int64)
    keys = {"eps": 0.6, "min_samples": 2, "k1": 6, "k2": 2}
    plain = DBSCANLabels(**keys)(FeatureBank(feats, cameras), 0)
    generator = AgreementLabels(neighbours=4, **keys)
    pseudo = generator(FeatureBank(feats, cameras, {"parts": parts}), 0)
    assert torch.equal(pseudo.labels, plain.labels)
    assert torch.equal(pseudo.centroids, plain.centroids)
    assert torch.equal(pseudo.extras["agreement"], cross_agreement(feats, parts, 4))
    assert generator(FeatureBank(feats, cameras), 0).extras == {}


def test_the_score_asks_the_search_of_the_labels(monkeypatch):
    asked = []

    def search(self, feats, k):
        asked.append((tuple(feats.shape), k))
        return nearest_neighbours(feats, k)

    monkeypatch.setattr(DBSCANLabels, "nearest", search)
    feats = F.normalize(rand(2, 8)[torch.arange(20) % 2] + 0.05 * rand(20, 8, seed=1)).float()
    bank = FeatureBank(feats, torch.zeros(20), {"parts": feats[:, None].expand(-1, 2, -1)})
    pseudo = AgreementLabels(neighbours=4, k1=6, k2=2, min_samples=2)(bank, 0)
    assert asked == [((20, 8), 6)] + 3 * [((20, 8), 5)]
    assert (pseudo.extras["agreement"] == 1).all()


def test_neighbours_out_of_range():
    with pytest.raises(ValueError, match="NEIGHBOURS is 0"):
        AgreementLabels(neighbours=0)


# losses


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_refined_label_loss_equals_a_loop(values, beta):
    targets = targets_by_loop(values["part_logits"], values["agreement"], values["labels"], beta)
    found = refined_targets(values["part_logits"], values["agreement"], values["labels"], beta)
    torch.testing.assert_close(found, torch.tensor(targets, dtype=torch.float64))
    expected = 0.0
    for i in range(B):
        prediction = softmax(values["logits"][i].tolist())
        expected -= sum(targets[i][a] * math.log(prediction[a]) for a in range(K)) / B
    assert RefinedLabelLoss(beta=beta)(**values).item() == pytest.approx(expected, rel=1e-12)


def test_all_of_the_label_is_plain_cross_entropy(values):
    expected = F.cross_entropy(values["logits"], values["labels"])
    torch.testing.assert_close(RefinedLabelLoss(beta=1.0)(**values), expected)


def test_the_parts_get_no_gradient_from_the_global_loss(values):
    values["part_logits"].requires_grad_()
    values["logits"].requires_grad_()
    RefinedLabelLoss()(**values).backward()
    assert values["part_logits"].grad is None
    assert values["logits"].grad.abs().sum() > 0


def parts_by_loop(values, one) -> float:
    """Mean over batch and parts of `one(prediction, label, agreement)`."""
    total = 0.0
    for i, label in enumerate(values["labels"].tolist()):
        for p in range(P):
            prediction = softmax(values["part_logits"][i, p].tolist())
            total += one(prediction, label, values["agreement"][i, p].item()) / (B * P)
    return total


def test_agreement_smoothing_equals_a_loop(values):
    def one(prediction, label, agreement):
        divergence = sum(1 / K * math.log(1 / K / q) for q in prediction)
        return agreement * -math.log(prediction[label]) + (1 - agreement) * divergence

    del values["logits"]
    assert AgreementSmoothingLoss()(**values, epoch=LATE).item() == pytest.approx(parts_by_loop(values, one), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_even_smoothing_equals_a_loop(values, smoothing):
    def one(prediction, label, agreement):
        target = [(1 - smoothing) * (a == label) + smoothing / K for a in range(K)]
        return -sum(t * math.log(q) for t, q in zip(target, prediction, strict=True))

    found = PartCrossEntropyLoss(smoothing=smoothing)(values["part_logits"], values["labels"]).item()
    assert found == pytest.approx(parts_by_loop(values, one), rel=1e-12)


def test_the_agreement_counts_from_the_stated_epoch_on(values):
    del values["logits"]
    loss = AgreementSmoothingLoss(smoothing=0.1, first_epochs=5)
    early = PartCrossEntropyLoss(smoothing=0.1)(values["part_logits"], values["labels"])
    for epoch in range(5):
        assert loss(**values, epoch=epoch) == early
    late = AgreementSmoothingLoss(first_epochs=0)(**values, epoch=0)
    assert loss(**values, epoch=5) == late != early


def test_full_agreement_is_cross_entropy_and_none_wants_an_even_prediction(values):
    full = torch.ones(B, P, dtype=torch.float64)
    loss = AgreementSmoothingLoss()
    expected = PartCrossEntropyLoss()(values["part_logits"], values["labels"])
    torch.testing.assert_close(loss(values["part_logits"], full, values["labels"], LATE), expected)
    even = torch.full((B, P, K), 3.0, dtype=torch.float64)
    torch.testing.assert_close(loss(even, 0 * full, values["labels"], LATE), torch.zeros((), dtype=torch.float64))


def losses(values) -> dict:
    """Name → function of the first tensor, its argument."""
    labels, agreement, parts = values["labels"], values["agreement"], values["part_logits"]
    return {
        "refined": (lambda x: RefinedLabelLoss()(x, parts.to(x.dtype), agreement, labels), values["logits"]),
        "even": (lambda x: PartCrossEntropyLoss(smoothing=0.1)(x, labels), parts),
        "agreement": (lambda x: AgreementSmoothingLoss()(x, agreement, labels, LATE), parts),
        "triplet": (lambda x: UnnormalizedTripletLoss()(x, labels), 3 * rand(B, D, seed=9)),
    }


NAMES = ["refined", "even", "agreement", "triplet"]


@pytest.mark.parametrize("name", NAMES)
def test_gradients(values, name):
    loss, argument = losses(values)[name]
    assert torch.autograd.gradcheck(loss, (argument.requires_grad_(),))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near(values, name, dtype):
    loss, argument = losses(values)[name]
    found = loss(argument.to(dtype))
    assert found.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(found.double(), loss(argument), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_batch_does_not_matter(values, name):
    expected = losses(values)[name][0](losses(values)[name][1])
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    mixed = losses({key: value[order] for key, value in values.items()})
    argument = losses(values)[name][1][order]
    torch.testing.assert_close(mixed[name][0](argument), expected)


def test_one_cluster_costs_nothing_but_the_triplet_stays_finite(values):
    one = {"labels": torch.zeros(B, dtype=torch.int64), "agreement": values["agreement"]}
    one |= {"logits": values["logits"][:, :1], "part_logits": values["part_logits"][..., :1]}
    for name in ("refined", "even", "agreement", "triplet"):
        loss, argument = losses(one)[name]
        argument = argument.detach().requires_grad_()
        loss(argument).backward()
        assert loss(argument).item() == pytest.approx(0.0, abs=1e-12)
        assert argument.grad is None or argument.grad.isfinite().all()


def test_triplet_worked_by_hand():
    unnormalized = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 6.0], [0.0, 8.0]], dtype=torch.float64)
    # distances: 0-1 5, 0-2 6, 0-3 8, 1-2 sqrt(13), 1-3 5, 2-3 2; clusters {0,1} and {2,3}
    gaps = [5 - 6, 5 - math.sqrt(13), 2 - math.sqrt(13), 2 - 5]
    expected = sum(math.log1p(math.exp(gap)) for gap in gaps) / 4
    assert UnnormalizedTripletLoss()(unnormalized, torch.tensor([0, 0, 1, 1])).item() == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RefinedLabelLoss(beta=1.5), r"RefinedLabelLoss: BETA is 1\.5"),
        (lambda: PartCrossEntropyLoss(smoothing=1.0), r"PartCrossEntropyLoss: SMOOTHING is 1\.0"),
        (lambda: AgreementSmoothingLoss(smoothing=-0.1), r"AgreementSmoothingLoss: SMOOTHING is -0\.1"),
        (lambda: AgreementSmoothingLoss(first_epochs=-1), "FIRST_EPOCHS is -1"),
    ],
)
def test_keys_out_of_range(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# the model

SMALL = ["INPUT.SIZE=[48, 24]", "MODEL.BACKBONE.WIDTH=2", "MODEL.DEVICE=cpu"]


def model(*overrides: str):
    torch.manual_seed(0)
    return build_model(load_config(CONFIGS / "synthetic.yaml", [*SMALL, *overrides]), 12)


def clustering(dim: int = 16, cameras: int = 3) -> tuple[PseudoLabels, FeatureBank]:
    """Twelve images: three clusters of three and three outliers."""
    labels = torch.tensor([0, 1, 2] * 3 + [-1] * 3)
    feats = F.normalize(rand(12, dim, seed=11)).float()
    parts = F.normalize(rand(12, P, dim, seed=12), dim=2).float()
    means = F.normalize(torch.stack([feats[labels == k].mean(0) for k in range(3)]))
    pseudo = PseudoLabels(labels, means, {"agreement": rand(12, P, seed=13).sigmoid().float()})
    return pseudo, FeatureBank(feats, torch.arange(12) % cameras, {"parts": parts})


def batch(labels: list[int], index: list[int]) -> Batch:
    views = (torch.rand(len(labels), 3, 48, 24, generator=torch.Generator().manual_seed(1)),)
    cameras = torch.arange(len(labels)) % 2
    return Batch(views, torch.tensor(index), torch.tensor(labels), cameras, torch.zeros(len(labels), dtype=torch.int64))


def test_classifiers_are_aimed_at_the_unit_means_of_their_branch():
    net, (pseudo, bank) = model(), clustering()
    shape = net.classifiers.shape
    net.update_memory(pseudo, bank)
    assert net.classifiers.shape == shape == (1 + P, 12, 16)
    for branch, feats in enumerate([bank.feats, *bank.extras["parts"].unbind(1)]):
        for k in range(3):
            mean = feats[pseudo.labels == k].double().mean(0)
            torch.testing.assert_close(net.classifiers[branch, k].double(), mean / mean.norm(), rtol=1e-5, atol=1e-6)
    assert net.classifiers.requires_grad
    assert not net.classifiers[:, 3:].any()


def test_logits_are_products_of_raw_features_with_the_rows_in_use():
    net, (pseudo, bank) = model(), clustering()
    net.update_memory(pseudo, bank)
    inputs = net.eval().loss_inputs(batch([0, 1, 2, 0], [0, 1, 2, 6]))
    assert inputs["logits"].shape == (4, 3)
    assert inputs["part_logits"].shape == (4, P, 3)
    for i in range(4):
        for k in range(3):
            torch.testing.assert_close(inputs["logits"][i, k], inputs["unnormalized"][i] @ net.classifiers[0, k])
            for p in range(P):
                expected = inputs["unnormalized_parts"][i, p] @ net.classifiers[1 + p, k]
                torch.testing.assert_close(inputs["part_logits"][i, p, k], expected)
    torch.testing.assert_close(inputs["agreement"], pseudo.extras["agreement"][[0, 1, 2, 6]])


def test_a_checkpoint_that_counted_epochs_itself_loads():
    net = model()
    old = {**model().state_dict(), "clusterings": torch.tensor(3)}
    net.load_state_dict(old)
    assert torch.equal(net.classifiers, old["classifiers"])


def test_moments_of_the_optimiser_stay_valid_when_the_clusters_change():
    net, (pseudo, bank) = model(), clustering()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(2):
        net.update_memory(pseudo, bank)
        outputs = net.train()(batch([0, 0, 1, 1], [0, 3, 1, 4]))
        sum(value for name, value in outputs.items() if name.startswith("loss")).backward()
        optimizer.step()
        optimizer.zero_grad()
        kept = torch.where(pseudo.labels == 2, -1, pseudo.labels)
        pseudo = PseudoLabels(kept, pseudo.centroids[:2], pseudo.extras)
    state = optimizer.state[net.classifiers]
    assert state["exp_avg"].shape == net.classifiers.shape
    assert state["exp_avg"][:, :3].abs().sum() > 0
    assert not state["exp_avg"][:, 3:].any()


def test_extraction_gives_features_and_parts():
    found = model().eval().extract(torch.zeros(2, 3, 48, 24, dtype=torch.uint8))
    assert found["feats"].shape == (2, 16)
    assert found["parts"].shape == (2, P, 16)


def proxies_by_loop(feats, labels, cameras, bank_feats, bank_labels, bank_cameras, temperature, negatives) -> float:
    """Batch mean of the contrast with unit means of (cluster, camera), positives from other cameras."""
    rows = {}
    for key in {(int(a), int(c)) for a, c in zip(bank_labels, bank_cameras, strict=True) if a >= 0}:
        member = (bank_labels == key[0]) & (bank_cameras == key[1])
        mean = bank_feats[member].double().mean(0)
        rows[key] = mean / mean.norm()
    total = 0.0
    for i, (label, camera) in enumerate(zip(labels.tolist(), cameras.tolist(), strict=True)):
        logit = {key: float(feats[i].detach().double() @ row) / temperature for key, row in rows.items()}
        positive = [value for (a, c), value in logit.items() if a == label and c != camera]
        negative = sorted((value for (a, _), value in logit.items() if a != label), reverse=True)[:negatives]
        log_total = math.log(sum(math.exp(value) for value in positive + negative))
        total += sum(log_total - value for value in positive) / max(1, len(positive)) if positive else 0.0
    return total / len(labels)


@pytest.mark.parametrize(("temperature", "negatives"), [(0.07, 50), (0.2, 2)])
def test_camera_loss_is_that_of_the_whole_and_the_mean_of_the_parts(temperature, negatives):
    keys = [f"MODEL.CAMERA_TEMPERATURE={temperature}", f"MODEL.CAMERA_NEGATIVES={negatives}"]
    net, (pseudo, bank) = model("MODEL.CAMERA_WEIGHT=0.5", *keys), clustering(cameras=2)
    net.update_memory(pseudo, bank)
    data = batch([0, 1, 2, 0], [0, 1, 2, 6])
    inputs = net.eval().loss_inputs(data)
    branches = [(inputs["feats"], bank.feats)]
    branches += [(inputs["parts"][:, p], bank.extras["parts"][:, p]) for p in range(P)]
    whole, *parts = (
        proxies_by_loop(f, data.labels, data.cameras, rows, pseudo.labels, bank.cameras, temperature, negatives)
        for f, rows in branches
    )
    expected = 0.5 * (whole + sum(parts) / P)
    assert net(data)["loss_camera"].item() == pytest.approx(expected, rel=1e-4)


def test_clusters_of_one_camera_each_are_told(caplog, monkeypatch):
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    net, (pseudo, bank) = model("MODEL.CAMERA_WEIGHT=0.5"), clustering(cameras=2)
    net.update_memory(pseudo, bank)
    assert "no cluster is seen by two cameras" not in caplog.text
    bank.cameras = pseudo.labels.clamp_min(0)
    net.update_memory(pseudo, bank)
    assert "no cluster is seen by two cameras" in caplog.text


def test_without_camera_weight_no_camera_is_read():
    net, (pseudo, bank) = model(), clustering()
    bank.cameras = torch.full((12,), -1)
    net.update_memory(pseudo, bank)
    assert "loss_camera" not in net(batch([0, 1], [0, 1]))


def test_state_of_camera_proxies_loads():
    net, (pseudo, bank) = model("MODEL.CAMERA_WEIGHT=0.5"), clustering()
    net.update_memory(pseudo, bank)
    other = model("MODEL.CAMERA_WEIGHT=0.5")
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.proxies[2].features, net.proxies[2].features)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("MODEL.HEAD={NAME: EmbeddingHead}", r"EmbeddingHead gives no parts.*Set MODEL\.HEAD\.NAME to PartHead"),
        ("MODEL.MEMORY={NAME: ClusterMemory}", r"reads no memory\. Set MODEL\.MEMORY to null"),
        ("MODEL.CAPACITY=0", r"MODEL\.CAPACITY is 0"),
        ("MODEL.CAMERA_WEIGHT=-1", r"MODEL\.CAMERA_WEIGHT is -1"),
        ("MODEL.CAMERA_TEMPERATURE=0", r"MODEL\.CAMERA_TEMPERATURE is 0"),
        ("MODEL.CAMERA_NEGATIVES=0", r"MODEL\.CAMERA_NEGATIVES is 0"),
    ],
)
def test_a_model_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        model(change)


def test_a_map_with_too_few_lines_for_the_parts_says_what_to_change():
    net = model("INPUT.SIZE=[16, 16]")
    with pytest.raises(ValueError, match=r"PARTS is 3 but the feature map has 2 lines.*Lower PARTS.*INPUT\.SIZE"):
        net.eval().extract(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))


def test_labels_that_do_not_fit_are_refused():
    net, (pseudo, bank) = model(), clustering()
    with pytest.raises(ValueError, match=r"Set PSEUDO_LABELS\.NAME to AgreementLabels"):
        net.update_memory(PseudoLabels(pseudo.labels, pseudo.centroids), bank)
    small = model("MODEL.CAPACITY=2")
    with pytest.raises(ValueError, match=r"3 clusters for classifiers of 2 rows.*Raise MODEL\.CAPACITY"):
        small.update_memory(pseudo, bank)
    with pytest.raises(ValueError, match="labelled sources"):
        net.update_memory(pseudo, FeatureBank(bank.feats, bank.cameras, bank.extras, bank.feats, pseudo.labels))
    cameras = model("MODEL.CAMERA_WEIGHT=0.5")
    with pytest.raises(ValueError, match="camera"):
        cameras.update_memory(pseudo, FeatureBank(bank.feats, torch.full((12,), -1), bank.extras))


# the whole road


def trained(tiny, tmp_path, name: str, *more: str, resume: bool = False) -> DefaultTrainer:
    recipe = [*tiny, "PSEUDO_LABELS.K1=8", "PSEUDO_LABELS.K2=3", "PSEUDO_LABELS.MIN_SAMPLES=2"]
    recipe += ["MODEL.BACKBONE.WIDTH=4", f"OUTPUT_DIR={tmp_path / name}", *more]
    trainer = DefaultTrainer(load_config(CONFIGS / "synthetic.yaml", recipe))
    if resume:
        trainer.resume()
    trainer.train()
    return trainer


def test_camera_variant_trains_and_resumes_bit_for_bit(tiny, tmp_path):
    straight = trained(tiny, tmp_path, "straight", "MODEL.CAMERA_WEIGHT=0.5")
    with pytest.MonkeyPatch.context() as patch:  # ends the first process after one of two epochs
        patch.setattr(
            DefaultTrainer, "_train_epoch", lambda self, go=DefaultTrainer._train_epoch: _once(self, go), raising=True
        )
        with pytest.raises(KeyboardInterrupt):
            trained(tiny, tmp_path, "parts", "MODEL.CAMERA_WEIGHT=0.5")
    resumed = trained(tiny, tmp_path, "parts", "MODEL.CAMERA_WEIGHT=0.5", resume=True)
    one, two = straight.model.state_dict(), resumed.model.state_dict()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    lines = [json.loads(line) for line in (straight.folder / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_global", "loss_parts", "loss_triplet", "loss_camera", "agreement"} <= lines[-1].keys()


def _once(trainer, go):
    if trainer.epoch == 1:
        raise KeyboardInterrupt
    go(trainer)


@pytest.mark.parametrize("name", ["omniglot", "grocery", "omniglot_baseline", "grocery_baseline"])
def test_real_set_configs_build_at_the_size_of_the_comparison(name):
    cfg = load_config(CONFIGS / f"{name}.yaml", ["INPUT.SIZE=[48,48]", "MODEL.BACKBONE.WIDTH=16"])
    found = build_model(cfg, 8).eval().extract(torch.zeros(2, 3, 48, 48, dtype=torch.uint8))
    assert found["parts"].shape == (2, 3, 128)
