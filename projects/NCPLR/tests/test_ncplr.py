"""Neighbours, refined labels and the model of NCPLR: the official code, plain loops, cases by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import nn

from fastreid_uns.modeling.heads import PartHead
from fastreid_uns.modeling.losses import CrossEntropyLoss, LossSet
from fastreid_uns.modeling.memory import ClusterMemory, InstanceMemory, moved_once
from fastreid_uns.projects.NCPLR.labels import NeighbourLabels, mixed_distance, neighbour_lists
from fastreid_uns.projects.NCPLR.losses import (
    GlobalLocalLoss,
    NeighbourRefinedLoss,
    PartContrastLoss,
    expected,
    neighbour_weights,
)
from fastreid_uns.projects.NCPLR.model import NCPLRModel
from fastreid_uns.pseudo_labels.base import centroids
from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels
from fastreid_uns.pseudo_labels.jaccard import jaccard_distance
from fastreid_uns.structures import Batch, FeatureBank, HeadOutput, PseudoLabels

GOLDEN = sorted((Path(__file__).parent / "golden").glob("ncplr_*.npz"))
WEIGHTING = ("uniform", "farther")  # option 0 and 1 of the official code


def read(path: Path) -> dict[str, torch.Tensor]:
    found = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(path).items()}
    return {key: value.long() if value.dtype == torch.int32 else value for key, value in found.items()}


def neighbours_of(z: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images of the batch, and the lists of their neighbours."""
    matrix = z["in_distance"].numpy()
    count = len(matrix)
    stored = (matrix.ravel(), np.tile(np.arange(count), count), count * np.arange(count + 1))  # zeros as well
    images, distance = neighbour_lists(csr_matrix(stored), float(z["par_eps"]))
    return z["in_index"], images[z["in_index"]], distance[z["in_index"]]


def keys_of(z: dict[str, torch.Tensor]) -> dict[str, object]:
    return {
        "alpha": float(z["par_alpha"]),
        "weighting": WEIGHTING[int(z["par_weighted"])],
        "neighbour_temperature": float(z["par_neighbor_temp"]),
    }


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_losses_and_gradients_of_the_official_module(path):
    z = read(path)
    index, images, distance = neighbours_of(z)
    labels = z["in_labels"][index]
    names = [name for name in ("", "_up", "_down") if f"in_logits{name}" in z]
    whole, *parts = (z[f"in_logits{name}"].requires_grad_() for name in names)
    if parts:
        keys = {"alpha_part": float(z["par_alpha_part"]), "kl_temperature": float(z["par_temp_kl"])}
        loss = GlobalLocalLoss(**keys_of(z), **keys, part_weight=float(z["par_lambda2"]))(
            whole, torch.stack(parts, dim=1), labels, index, images, distance
        )
    else:
        loss = NeighbourRefinedLoss(**keys_of(z))(whole, labels, index, images, distance)
    torch.testing.assert_close(loss, z["out_loss"], rtol=1e-5, atol=5e-6)
    loss.backward()
    for name, given in zip(names, (whole, *parts), strict=True):
        wanted = z[f"out_grad_logits{name}"]
        torch.testing.assert_close(given.grad, wanted, rtol=0, atol=3e-6 + 1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_targets_of_the_official_module(path):
    z = read(path)
    index, images, distance = neighbours_of(z)
    loss = NeighbourRefinedLoss(**keys_of(z))
    found = expected(loss.weights(index, images, distance), z["in_logits"])
    onehot = F.one_hot(z["in_labels"][index], found.shape[1]).float()
    torch.testing.assert_close(loss.alpha * onehot + (1 - loss.alpha) * found, z["out_refined_own"], rtol=0, atol=5e-6)


@pytest.mark.parametrize(("weighting", "sign"), [("uniform", 0.0), ("farther", 1.0), ("nearer", -1.0)])
def test_weights_by_a_plain_loop(weighting, sign):
    """Image 4 occurs twice and counts once, image 9 is no neighbour, image 7 is none of the batch."""
    every = [4, 9, 2, 4]
    lists = {4: [(4, 0.0), (2, 0.2), (7, 0.1)], 9: [(9, 0.0)], 2: [(2, 0.0), (4, 0.2)]}
    neighbours = torch.full((4, 3), -1)
    distance = torch.zeros(4, 3)
    for row, image in enumerate(every):
        for column, (other, far) in enumerate(lists[image]):
            neighbours[row, column], distance[row, column] = other, far
    index = torch.tensor(every)
    found = neighbour_weights(index, neighbours, distance, index, weighting, 0.5)
    wanted = torch.zeros(4, 4)
    for row, image in enumerate(every):
        present = {every.index(other): math.exp(sign * far / 0.5) for other, far in lists[image] if other in every}
        for column, weight in present.items():
            wanted[row, column] = weight / sum(present.values())
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", [NeighbourRefinedLoss, GlobalLocalLoss])
def test_with_different_images_the_order_of_the_batch_does_not_matter(kind):
    draw = torch.Generator().manual_seed(0)
    index, labels = torch.tensor([5, 3, 8, 0]), torch.tensor([0, 1, 1, 2])
    values = {"class_logits": torch.randn(4, 3, generator=draw), "labels": labels, "index": index}
    values["neighbours"] = torch.tensor([[5, 3], [3, 5], [8, -1], [0, 8]])
    values["neighbour_distance"] = torch.rand(4, 2, generator=draw)
    if kind is GlobalLocalLoss:
        values["part_class_logits"] = torch.randn(4, 2, 3, generator=draw)
    order = torch.tensor([2, 0, 3, 1])
    mixed = {name: value[order] for name, value in values.items()}
    torch.testing.assert_close(kind()(**mixed), kind()(**values))


def test_the_loss_of_the_parts_is_a_sum_over_them():
    logits, labels = torch.randn(4, 2, 3), torch.tensor([0, 1, 2, 0])
    wanted = F.cross_entropy(logits[:, 0], labels) + F.cross_entropy(logits[:, 1], labels)
    torch.testing.assert_close(PartContrastLoss()(logits, labels), wanted)


@pytest.fixture(scope="module")
def bank() -> FeatureBank:
    """12 identities seen 10 times; the parts know less."""
    draw = torch.Generator().manual_seed(3)
    identities = torch.arange(120) % 12
    middle = F.normalize(torch.randn(12, 16, generator=draw))

    def seen(noise: float) -> torch.Tensor:
        return F.normalize(middle[identities] + noise * torch.randn(120, 16, generator=draw))

    parts = torch.stack([seen(0.25), seen(0.3)], dim=1)
    return FeatureBank(seen(0.2), torch.full((120,), -1), {"parts": parts})


def dense(distance) -> np.ndarray:
    """Absent pairs are 1; the diagonal is stored."""
    matrix = np.ones(distance.shape)
    rows = np.repeat(np.arange(len(matrix)), np.diff(distance.indptr))
    matrix[rows, distance.indices] = distance.data
    return matrix


@pytest.mark.parametrize("eps", [0.3, 0.55, 0.8])
def test_the_distance_is_the_weighted_sum_of_three(bank, eps):
    parts = bank.extras["parts"]
    every = [dense(jaccard_distance(feats, 12, 3)) for feats in (bank.feats, parts[:, 0], parts[:, 1])]
    wanted = 0.6 * every[0] + 0.2 * every[1] + 0.2 * every[2]
    labels = NeighbourLabels(eps=eps, min_samples=3, k1=12, k2=3)
    found = labels._distance(labels.encoding(bank, 0), parts)
    assert found.has_sorted_indices
    near = dense(found)
    clear = np.abs(wanted - eps) > 1e-5
    assert ((wanted <= eps) == (near < 1))[clear].all()
    np.testing.assert_allclose(near[near < 1], wanted[near < 1], atol=2e-6)
    assert (near == near.T).all()
    assert not near.diagonal().any()


def test_absent_pairs_count_as_far_by_hand():
    """0.5 x 0.2 + 0.5 x 1 = 0.6: beyond 0.55, within 0.6."""
    eye = csr_matrix((np.array([0, 0.2, 0.2, 0], np.float32), [0, 1, 0, 1], [0, 2, 4]))
    alone = csr_matrix((np.zeros(2, np.float32), [0, 1], [0, 1, 2]))
    assert mixed_distance([eye, alone], [0.5, 0.5], 0.55).nnz == 2
    assert mixed_distance([eye, alone], [0.5, 0.5], 0.61).toarray()[0, 1] == pytest.approx(0.6, abs=1e-6)


def test_neighbours_are_those_within_the_radius(bank):
    labels = NeighbourLabels(eps=0.6, radius=0.35, min_samples=3, k1=12, k2=3)
    distance = dense(labels._distance(labels.encoding(bank, 0), bank.extras["parts"]))
    pseudo = labels(bank, 0)
    images, values = pseudo.extras["neighbours"], pseudo.extras["neighbour_distance"]
    assert images.shape == values.shape == (120, int((distance <= 0.35).sum(1).max()))
    for i in range(120):
        wanted = np.flatnonzero(distance[i] <= np.float32(0.35)).tolist()
        assert i in wanted
        assert images[i].tolist() == wanted + [-1] * (images.shape[1] - len(wanted))
        assert values[i, : len(wanted)].tolist() == pytest.approx(distance[i, wanted].tolist())


def test_without_parts_the_clusters_are_those_of_dbscan(bank):
    alone = FeatureBank(bank.feats, bank.cameras)
    keys = {"eps": 0.6, "min_samples": 3, "k1": 12, "k2": 3}
    found, wanted = NeighbourLabels(**keys)(alone, 0), DBSCANLabels(**keys)(alone, 0)
    assert torch.equal(found.labels, wanted.labels)
    assert wanted.num_clusters > 3


class Given(nn.Module):
    """Whole image and two parts are thirds of the first pixels; the neck doubles."""

    def __init__(self, parts: bool = True) -> None:
        super().__init__()
        self.dim = 4
        self.head = PartHead(4, parts=2) if parts else nn.Identity()

    def forward(self, images: torch.Tensor, domains: torch.Tensor | None = None) -> HeadOutput:
        whole, *parts = images.flatten(1).split(4, dim=1)
        if not isinstance(self.head, PartHead):
            return HeadOutput(whole, F.normalize(whole), unnormalized=2 * whole)
        stacked = torch.stack(parts, dim=1)
        return HeadOutput(whole, F.normalize(whole), F.normalize(stacked, dim=2), 2 * whole, 2 * stacked)


def model(*, parts: bool = True, memory: object = None, **keys: object) -> NCPLRModel:
    losses = {"contrast": (CrossEntropyLoss(), 0.8), "parts": (PartContrastLoss(), 0.2)} if parts else {}
    losses["refined"] = ((GlobalLocalLoss if parts else NeighbourRefinedLoss)(), 1.0)
    memory = ClusterMemory(4, momentum=0.4) if memory is None else memory
    return NCPLRModel(Given(parts), memory, LossSet(losses), 9, **keys).train()


LABELS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, -1])


def clustering(parts: bool = True) -> tuple[PseudoLabels, FeatureBank]:
    draw = torch.Generator().manual_seed(6)
    feats, by_part = F.normalize(torch.randn(9, 4, generator=draw)), torch.randn(9, 2, 4, generator=draw)
    extras = {"parts": F.normalize(by_part, dim=2)} if parts else {}
    found = {"neighbours": torch.arange(9)[:, None], "neighbour_distance": torch.zeros(9, 1)}
    return PseudoLabels(LABELS, centroids(feats, LABELS), found), FeatureBank(feats, torch.full((9,), -1), extras)


def batch_of(index: list[int], seed: int = 0) -> Batch:
    images = torch.randn(len(index), 12, generator=torch.Generator().manual_seed(seed))
    place, none = torch.tensor(index), torch.zeros(len(index), dtype=torch.int64)
    return Batch((images,), place, LABELS[place], none, none, most=2)


def test_each_branch_has_a_memory_and_a_classifier_of_its_own():
    net, (pseudo, bank) = model(), clustering()
    net.update_memory(pseudo, bank)
    branches = (bank.feats, *bank.extras["parts"].unbind(1))
    for number, (memory, feats) in enumerate(zip((net.memory, *net.part_memories), branches, strict=True)):
        means = torch.stack([F.normalize(feats[k == LABELS].mean(0), dim=0) for k in range(3)])
        torch.testing.assert_close(memory.features, means)
        torch.testing.assert_close(net.classifiers[number, :3], means)
        assert not net.classifiers[number, 3:].any()


def test_what_the_losses_are_offered_and_how_every_memory_moves():
    net, (pseudo, bank) = model(), clustering()
    net.update_memory(pseudo, bank)
    before = [memory.features.clone() for memory in (net.memory, *net.part_memories)]
    batch = batch_of([0, 3, 1, 6])
    inputs = net.loss_inputs(batch)
    whole, *parts = batch.views[0].split(4, dim=1)
    for number, raw in enumerate((whole, *parts)):
        said = F.normalize(raw) @ before[number].T / 0.05
        logits = 2 * raw @ net.classifiers[number, :3].T
        for name, found in (("logits", said), ("class_logits", logits)):
            own = inputs[name] if number == 0 else inputs[f"part_{name}"][:, number - 1]
            torch.testing.assert_close(own, found)
        moved = before[number].clone()
        for label, row in zip(batch.labels.tolist(), F.normalize(raw), strict=True):
            moved[label] = F.normalize(0.4 * moved[label] + 0.6 * row, dim=0)
        torch.testing.assert_close((net.memory, *net.part_memories)[number].features, moved)
    assert torch.equal(inputs["neighbours"], batch.index[:, None])


def test_a_batch_in_parts_moves_each_memory_once():
    pseudo, bank = clustering()
    whole, parts = model(), model()
    for net in (whole, parts):
        net.update_memory(pseudo, bank)
    batch = batch_of([0, 1, 3, 4])
    whole(batch)
    with moved_once(parts):
        for rows in (slice(0, 2), slice(2, 4)):
            parts(batch.rows(rows))
    for one, other in zip((whole.memory, *whole.part_memories), (parts.memory, *parts.part_memories), strict=True):
        torch.testing.assert_close(other.features, one.features)
        assert not torch.equal(one.features, torch.zeros_like(one.features))


def test_a_checkpoint_brings_all_memories_back():
    net, (pseudo, bank) = model(), clustering()
    net.update_memory(pseudo, bank)
    other = model()
    other.load_state_dict(net.state_dict())
    for one, same in zip(net.part_memories, other.part_memories, strict=True):
        assert torch.equal(one.features, same.features)
    assert not torch.equal(net.part_memories[0].features, net.part_memories[1].features)


def test_without_parts_there_is_one_memory_and_one_classifier():
    net, (pseudo, bank) = model(parts=False), clustering(parts=False)
    net.update_memory(pseudo, bank)
    outputs = net(batch_of([0, 3, 1, 6]))
    assert {"loss_refined", "accuracy"} == set(outputs)
    assert net.classifiers.shape == (1, 9, 4)


def told(net: NCPLRModel, **changes: object) -> None:
    pseudo, bank = clustering()
    for name, value in changes.items():
        setattr(bank if hasattr(bank, name) else pseudo, name, value)
    net.update_memory(pseudo, bank)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: model(memory=InstanceMemory(4)), "NCPLRModel got InstanceMemory; set it to ClusterMemory"),
        (lambda: NCPLRModel(Given(), None, LossSet({}), 9), "NCPLRModel got none"),
        (lambda: model(capacity=0), "MODEL.CAPACITY is 0; 1 or more rows"),
        (lambda: told(model(capacity=2)), "3 clusters for classifiers of 2 rows. Raise MODEL.CAPACITY"),
        (lambda: told(model(), source_feats=torch.zeros(1, 4)), "labelled sources were found"),
        (
            lambda: model().update_memory(PseudoLabels(LABELS, torch.zeros(3, 4)), clustering()[1]),
            "labels hold nothing beside the clusters; .* Set PSEUDO_LABELS.NAME to NeighbourLabels",
        ),
        (lambda: NeighbourLabels(radius=0.7), "RADIUS is 0.7 and EPS 0.6; 0 to EPS is accepted"),
        (lambda: NeighbourLabels(whole=0.0), "WHOLE is 0.0; a share in"),
        (lambda: NeighbourRefinedLoss(alpha=1.5), "NeighbourRefinedLoss: ALPHA is 1.5"),
        (lambda: NeighbourRefinedLoss(weighting="near"), "WEIGHTING is 'near'; accepted: uniform, farther, nearer"),
        (lambda: GlobalLocalLoss(neighbour_temperature=0.0), "NEIGHBOUR_TEMPERATURE is 0.0; above 0"),
        (lambda: GlobalLocalLoss(alpha_part=-1.0), "ALPHA_PART is -1.0"),
        (lambda: GlobalLocalLoss(part_weight=2.0), "PART_WEIGHT is 2.0"),
        (lambda: GlobalLocalLoss(kl_temperature=0.0), "KL_TEMPERATURE is 0.0; a number above 0"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()
