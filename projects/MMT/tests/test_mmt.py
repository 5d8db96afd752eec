"""The losses, the networks and the two stages of MMT: the official code, plain loops, cases by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.hooks import ResetStateHook
from fastreid_uns.modeling.losses import CrossEntropyLoss, LossSet, SoftCrossEntropyLoss
from fastreid_uns.modeling.memory import ClusterMemory
from fastreid_uns.projects.MMT.labels import MutualKMeansLabels
from fastreid_uns.projects.MMT.losses import PooledTripletLoss, SoftTripletDistillLoss
from fastreid_uns.projects.MMT.mutual import MutualModel, SecondNetworkHook
from fastreid_uns.projects.MMT.source import SourceModel
from fastreid_uns.structures import Batch, FeatureBank, HeadOutput, Moment, PseudoLabels

CONFIGS = Path(__file__).parents[1] / "configs"
GOLDEN = sorted((Path(__file__).parent / "golden").glob("mmt_*.npz"))
OTHER = {1: 2, 2: 1}


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem)
def z(request) -> dict[str, torch.Tensor]:
    found = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(request.param).items()}
    return {key: value.long() if value.dtype == torch.int32 else value for key, value in found.items()}


def four_losses(z: dict[str, torch.Tensor]) -> dict[str, tuple[nn.Module, float]]:
    """As `method.yaml` names them: half of the share that is soft is taken from the hard ones."""
    ce, triplet = float(z["par_soft_ce"]), float(z["par_soft_tri"])
    return {
        "ce": (CrossEntropyLoss(smoothing=float(z["par_smoothing"])), 1 - ce),
        "ce_soft": (SoftCrossEntropyLoss(), ce),
        "tri": (PooledTripletLoss(), 1 - triplet),
        "tri_soft": (SoftTripletDistillLoss(), triplet),
    }


def inputs_of(z: dict[str, torch.Tensor], number: int) -> dict[str, torch.Tensor]:
    """What `MutualModel` offers for a network, of the features and logits of the file."""
    return {
        "pooled": z[f"in_feat_{number}"],
        "logits": z[f"in_logits_{number}"],
        "teacher_pooled": z[f"in_feat_{OTHER[number]}_mean"],
        "teacher_logits": z[f"in_logits_{OTHER[number]}_mean"],
        "labels": z["in_labels"],
    }


def assert_gradient(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-6 + 1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["ce", "ce_soft", "tri", "tri_soft"])
def test_each_term_of_the_official_trainer(z, name, number):
    kind = "feat" if name.startswith("tri") else "logits"
    given = z[f"in_{kind}_{number}"].requires_grad_()
    losses = LossSet({name: (four_losses(z)[name][0], 1.0)})
    loss = losses(inputs_of(z, number))[f"loss_{name}"]
    torch.testing.assert_close(loss, z[f"out_loss_{name}_{number}"], rtol=1e-5, atol=5e-6)
    loss.backward()
    assert_gradient(given.grad, z[f"out_grad_{kind}_{number}_{name}_{number}"])


def test_the_total_of_the_official_trainer(z):
    names = ("feat_1", "feat_2", "logits_1", "logits_2")
    for name in names:
        z[f"in_{name}"].requires_grad_()
    losses = LossSet(four_losses(z))
    total = sum(value for number in (1, 2) for value in losses(inputs_of(z, number)).values())
    torch.testing.assert_close(total, z["out_loss_total"], rtol=1e-5, atol=5e-6)
    total.backward()
    for name in names:
        assert_gradient(z[f"in_{name}"].grad, z[f"out_grad_{name}_total"])


def test_the_configured_weights_are_those_of_the_paper(z):
    cfg = load_config(CONFIGS / "market_msmt.yaml", ["MODEL.WEIGHTS=''"])
    assert [cfg.MODEL.LOSSES[name].WEIGHT for name in ("ce", "soft_ce", "triplet", "soft_triplet")] == [
        pytest.approx(weight) for _, weight in four_losses(z).values()
    ]


def test_the_momentum_of_the_official_average(z, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fastreid_uns.projects.MMT.mutual.update_momentum", lambda *networks_and_more: seen.append(networks_and_more[2])
    )
    net = model()
    for step in z["par_steps"].tolist():
        net.moment = Moment(step=step)
        net.update_momentum(0.999)
    assert seen[::2] == seen[1::2] == pytest.approx(z["out_momentum"].tolist(), rel=1e-12)


def test_soft_triplets_equal_a_plain_loop():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    labels = [0, 0, 0, 1, 1, 2, 0]  # the image of class 2 is its own positive
    total = 0.0
    for i in range(7):
        own = [max(1e-6, float((student[i] - student[j]).norm())) for j in range(7)]
        positive = max((j for j in range(7) if labels[j] == labels[i]), key=lambda j, own=own: own[j])
        negative = min((j for j in range(7) if labels[j] != labels[i]), key=lambda j, own=own: own[j])
        by_teacher = [max(1e-6, float((teacher[i] - teacher[j]).norm())) for j in (positive, negative)]
        share = math.exp(by_teacher[0]) / (math.exp(by_teacher[0]) + math.exp(by_teacher[1]))
        gap = own[positive] - own[negative]
        total += share * math.log1p(math.exp(-gap)) + (1 - share) * math.log1p(math.exp(gap))
    found = SoftTripletDistillLoss()(student, teacher, torch.tensor(labels))
    assert float(found) == pytest.approx(total / 7, rel=1e-8)


def test_soft_triplets_of_one_class_are_zero_with_a_finite_gradient():
    feats = torch.randn(4, 5, requires_grad=True)
    loss = SoftTripletDistillLoss()(feats, torch.randn(4, 5), torch.zeros(4, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert torch.isfinite(feats.grad).all()


class Given(nn.Module):
    """Pools to the first pixels; the neck doubles."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor, domains: torch.Tensor | None = None) -> HeadOutput:
        pooled = images.flatten(1)[:, : self.dim].float() * self.scale
        return HeadOutput(pooled, F.normalize(pooled), unnormalized=2 * pooled)


class Seen(nn.Module):
    """Keeps what it is offered."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Tensor, ...]] = []

    def forward(self, pooled, logits, teacher_pooled, teacher_logits, teacher_feats, labels):
        self.calls.append((pooled, logits, teacher_pooled, teacher_logits, teacher_feats, labels))
        return pooled.sum()


def model(images: int = 9, **keys: object) -> MutualModel:
    net = MutualModel(Given(), None, LossSet({"seen": (Seen(), 1.0)}), images, **keys)
    scales = (net.encoder, net.encoder_2, net.teacher, net.teacher_2)
    for factor, part in zip((1.0, 2.0, 3.0, 4.0), scales, strict=True):
        part.scale.data.fill_(factor)
    return net.train()


def batch_of(*views: torch.Tensor, labels: torch.Tensor | None = None) -> Batch:
    none = torch.zeros(len(views[0]), dtype=torch.int64)
    return Batch(views, torch.arange(len(none)), none if labels is None else labels, none, none)


def clustered(net: MutualModel, centroids: torch.Tensor) -> MutualModel:
    count = len(centroids)
    bank = FeatureBank(torch.zeros(net.num_images, 3), torch.zeros(net.num_images))
    net.update_memory(PseudoLabels(torch.arange(net.num_images) % count, centroids), bank)
    return net


def test_each_network_has_its_view_and_the_average_of_the_other_one_as_teacher():
    net = clustered(model(), torch.eye(3)[:2])
    one, two = torch.randn(4, 3), torch.randn(4, 3)
    outputs = net(batch_of(one, two, labels=torch.tensor([0, 1, 0, 1])))
    assert {"loss_seen_1", "loss_seen_2", "accuracy"} == set(outputs)
    first, second = net.losses.losses["seen"].calls
    for call, pooled, teacher in ((first, one, 4 * two), (second, 2 * two, 3 * one)):
        torch.testing.assert_close(call[0], pooled)
        torch.testing.assert_close(call[1], 2 * pooled[:, :2])  # K = 2, the first two unit vectors
        torch.testing.assert_close(call[2], teacher)
        torch.testing.assert_close(call[3], 2 * teacher[:, :2])
        assert not call[2].requires_grad
        assert not call[3].requires_grad
    hits = [call[1].argmax(1) == torch.tensor([0, 1, 0, 1]) for call in (first, second)]
    torch.testing.assert_close(outputs["accuracy"], torch.stack(hits).float().mean())


def test_the_first_step_copies_and_later_ones_average():
    net = clustered(model(), torch.eye(3)[:2])
    net.update_momentum(0.999)
    assert (net.teacher.scale.item(), net.teacher_2.scale.item()) == (1.0, 2.0)
    with torch.no_grad():
        net.encoder.scale.fill_(3.0)
        net.classifiers.zero_()
    net.moment = Moment(step=1)
    net.update_momentum(0.999)  # the mean of both steps
    assert net.teacher.scale.item() == pytest.approx(2.0)
    torch.testing.assert_close(net.teacher_classifiers[0, 0], torch.tensor([0.5, 0.0, 0.0]))


def test_all_four_classifiers_are_aimed_at_the_clusters_and_other_rows_wait():
    net = model(images=5, capacity=7)
    assert net.classifiers.shape == (2, 5, 3)  # not more than images
    centroids = F.normalize(torch.randn(4, 3))
    clustered(net, centroids)
    for rows in (*net.classifiers, *net.teacher_classifiers):
        assert torch.equal(rows[:4], centroids)
        assert not rows[4].any()
    clustered(net, centroids[:2])
    net(batch_of(torch.randn(2, 3), torch.randn(2, 3)))
    assert net.losses.losses["seen"].calls[0][1].shape == (2, 2)


def test_both_averages_are_extracted_and_the_first_is_deployed():
    net = model()
    images = torch.rand(2, 3, 1, 1)
    found = net.extract(images)
    torch.testing.assert_close(found["feats"], net.deploy(images).feats)
    assert net.deploy is net.teacher
    torch.testing.assert_close(found["peer_feats"], net.teacher_2(images).feats)


def test_the_mean_of_both_networks_is_clustered():
    """By the features of one network the images in the middle are a pair; the mean has the pairs at the ends."""
    angles, peers = torch.tensor([0.0, 0.5, 0.6, 1.1]), torch.tensor([0.0, -0.5, 1.6, 1.1])
    feats, peer = (torch.stack([a.cos(), a.sin()], dim=1) for a in (angles, peers))
    labels = MutualKMeansLabels(num_clusters=2)
    bank = FeatureBank(feats, torch.full((4,), -1), {"peer_feats": peer})
    pseudo = labels(bank, 0)
    assert (pseudo.labels[:, None] == pseudo.labels).int().tolist() == [[1, 1, 0, 0]] * 2 + [[0, 0, 1, 1]] * 2
    expected = F.normalize(F.normalize(feats + peer)[:2].sum(0), dim=0)
    torch.testing.assert_close(pseudo.centroids[pseudo.labels[0]], expected)
    assert torch.equal(bank.feats, feats)


SMALL = [
    "MODEL.BACKBONE.WIDTH=8",
    "INPUT.AUGMENTS.train={FLIP: 0.5, PAD: 2, ERASE: 0.0}",
    "PSEUDO_LABELS.NUM_CLUSTERS=12",
]


def test_networks_start_apart_and_the_optimiser_forgets(tiny):
    trainer = DefaultTrainer(load_config(CONFIGS / "synthetic.yaml", [*tiny, *SMALL]))
    net = trainer.model
    assert trainer.hook(ResetStateHook)
    trainer.train()
    for one, other in ((net.encoder, net.encoder_2), (net.teacher, net.teacher_2)):
        weights = [encoder.backbone.stem[0][0].weight for encoder in (one, other)]
        assert (weights[0] - weights[1]).abs().max() > 0.01
    assert {"loss_soft_triplet_2", "loss_ce_1"} <= set(trainer.last)


def test_the_second_stage_starts_from_two_runs_of_the_first(tiny, tiny_set, tmp_path):
    source = {**tiny_set, "SEED": 5, "TRAIN_IDENTITIES": 10}
    keys = [key for key in [*tiny, *SMALL] if "NUM_INSTANCES" not in key]  # the target is drawn at random
    keys += ["SOLVER.EPOCHS=1", f"DATASETS.SOURCES.drawn={json.dumps(source)}"]
    keys += ["DATALOADER.SOURCE_SAMPLER={NAME: ClusterSampler, BATCH_SIZE: 16, NUM_INSTANCES: 4}"]
    stage = []
    for seed in (1, 2):
        folder = tmp_path / f"source_{seed}"
        trainer = DefaultTrainer(
            load_config(CONFIGS / "synthetic_source.yaml", [*keys, f"SEED={seed}", f"OUTPUT_DIR={folder}"])
        )
        trainer.train()
        assert trainer.model.classes == 10
        stage.append(trainer.model.encoder.state_dict())
    weights = [f"MODEL.WEIGHTS={tmp_path / 'source_1' / 'checkpoint_0001.pth'}"]
    weights += [f"HOOKS.second.WEIGHTS={tmp_path / 'source_2'}"]
    trainer = DefaultTrainer(load_config(CONFIGS / "synthetic.yaml", [*tiny, *SMALL, *weights]))
    trainer.hook(SecondNetworkHook).before_train()
    net = trainer.model
    for encoder, expected in zip(
        (net.encoder, net.teacher, net.encoder_2, net.teacher_2), [stage[0]] * 2 + [stage[1]] * 2, strict=True
    ):
        found = encoder.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_target_rows_of_the_first_stage_have_no_loss():
    net = SourceModel(Given(), None, LossSet({"ce": (CrossEntropyLoss(), 1.0)}), 9, capacity=5)
    bank = FeatureBank(torch.zeros(9, 3), torch.zeros(9), source_feats=torch.zeros(4, 3), source_labels=torch.arange(4))
    net.update_memory(PseudoLabels(torch.zeros(9, dtype=torch.int64), torch.zeros(1, 3)), bank)
    images = torch.randn(5, 3, requires_grad=True)
    none = torch.zeros(5, dtype=torch.int64)
    domains, labels = torch.tensor([1, 1, 2, 0, 0]), torch.tensor([3, 0, 1, 4, 4])
    outputs = net(Batch((images,), torch.arange(5), labels, none, domains))
    logits = 2 * images[:3] @ net.classifier[:4].T
    torch.testing.assert_close(outputs["loss_ce"], F.cross_entropy(logits, labels[:3]))
    outputs["loss_ce"].backward()
    assert images.grad[:3].abs().sum() > 0
    assert not images.grad[3:].any()


class NotMutual:
    epochs_done = 0
    model = nn.Linear(1, 1)
    cfg = load_config(overrides=["MODEL.WEIGHTS=some.pth"])


def test_without_weights_of_its_own_the_second_network_starts_as_the_first(caplog):
    net = model()
    with caplog.at_level("WARNING", logger="fastreid_uns"):
        hooked(SecondNetworkHook(), net)
    assert net.encoder_2.scale.item() == 2.0  # as it was made
    assert "both networks start from MODEL.WEIGHTS and differ by their views alone" in caplog.text


def hooked(hook: SecondNetworkHook, net: nn.Module | None = None) -> None:
    hook.name, hook.trainer = "second", NotMutual()
    if net is not None:
        hook.trainer.model = net
    hook.before_train()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(momentum_encoder=False), "MOMENTUM_ENCODER is false; MutualModel learns from the averages"),
        (lambda: model(capacity=0), "MODEL.CAPACITY is 0; 1 or more rows"),
        (lambda: MutualModel(Given(), ClusterMemory(3), LossSet({}), 9), "Set MODEL.MEMORY to null"),
        (lambda: clustered(model(capacity=2), torch.eye(3)), "3 clusters for classifiers of 2 rows"),
        (
            lambda: model().update_memory(
                PseudoLabels(torch.zeros(9, dtype=torch.int64), torch.zeros(1, 3)),
                FeatureBank(torch.zeros(9, 3), torch.zeros(9), source_feats=torch.zeros(1, 3)),
            ),
            "names labelled sets; they are read by SourceModel",
        ),
        (lambda: SourceModel(Given(), ClusterMemory(3), LossSet({}), 9), "Set MODEL.MEMORY to null"),
        (lambda: SourceModel(Given(), None, LossSet({}), 9, capacity=0), "MODEL.CAPACITY is 0"),
        (lambda: clustered(SourceModel(Given(), None, LossSet({}), 9), torch.eye(3)), "names no labelled set"),
        (lambda: SecondNetworkHook(seed=-1), "SEED is -1; 0 or more"),
        (lambda: hooked(SecondNetworkHook()), "MODEL.NAME is Linear, which has one network"),
        (lambda: hooked(SecondNetworkHook(weights="gone/run"), model()), "gone/run is neither a run nor a file"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make()
