"""The memory of features that are replaced, its running means and its queue."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.projects.ACFL.memory import ReplacedMemory
from fastreid_uns.projects.ACFL.tests.acfl_golden import golden
from fastreid_uns.structures import FeatureBank, PseudoLabels


def filled(feats, labels, **keys) -> ReplacedMemory:
    memory = ReplacedMemory(feats.shape[1], **keys)
    clusters = torch.zeros(int(labels.max()) + 1, feats.shape[1])
    memory.reset(PseudoLabels(labels, clusters), FeatureBank(feats, torch.zeros(len(feats))))
    return memory


def random_set(images: int = 60, clusters: int = 7, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    feats = F.normalize(torch.randn(images, 8, generator=generator))
    labels = torch.arange(images) % (clusters + 1) - 1  # one in clusters + 1 is an outlier
    return feats, labels[torch.randperm(images, generator=generator)], generator


def batches(generator, labels, count: int = 12, size: int = 10):
    clustered = (labels >= 0).nonzero().flatten()
    for _ in range(count):
        rows = clustered[torch.randint(len(clustered), (size,), generator=generator)]
        yield F.normalize(torch.randn(size, 8, generator=generator)), rows


def assert_close(found, expected, tolerance=1e-6):
    torch.testing.assert_close(found, expected.float(), rtol=0, atol=tolerance)


def test_reference():
    data = golden("acfl_mem_01")
    memory = filled(data["in_M"], data["in_labels"])
    assert_close(memory.centroids, data["out_C_before"])
    memory.update(data["in_q"], data["in_idx"])
    assert_close(memory.features, data["out_M_after"])
    assert_close(memory.centroids, data["out_C_after"])
    memory.unit = True
    assert_close(memory.centroids, data["out_C_after_unit"])


def test_a_repeated_image_keeps_its_last_feature_and_counts_once():
    memory = filled(torch.eye(3)[[0, 1, 2, 2]], torch.tensor([0, 0, 1, -1]))
    feats = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    memory.update(feats, torch.tensor([0, 2, 0]))
    assert memory.features.tolist() == [[0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert memory.centroids.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_running_means_equal_the_means_of_the_rows_after_many_steps():
    feats, labels, generator = random_set()
    memory = filled(feats.clone(), labels)
    for batch, rows in batches(generator, labels):
        for feat, row in zip(batch, rows.tolist(), strict=True):  # the definition
            feats[row] = feat
        memory.update(batch, rows)
    assert_close(memory.features, feats, 0)
    assert_close(memory.centroids, torch.stack([feats[labels == a].mean(0) for a in range(7)]))


def test_logits_of_the_step_keep_their_rows():
    feats, labels, generator = random_set()
    memory = filled(feats, labels)
    before = memory.centroids
    kept = before.clone()
    memory.update(*next(batches(generator, labels)))
    assert torch.equal(before, kept)
    assert not torch.equal(memory.centroids, kept)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_an_outlier_belongs_to_no_mean(fraction):
    memory = filled(torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, -1]), fraction=fraction)
    before = memory.centroids
    memory.update(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([3]))
    assert torch.equal(memory.centroids, before)
    assert memory.features[3].tolist() == ([0, 1, 0] if fraction == 1 else [0, 0, 0])
    assert (memory.written[3] >= 0) == (fraction == 1)


def plain_queue(queue: list[int], labels: list[int], capacity: int) -> list[int]:
    """Rows that stay, oldest first: while there are too many, the oldest that is not the last of its cluster leaves."""
    queue = list(queue)
    while len(queue) > capacity:
        for row in queue:
            if sum(labels[other] == labels[row] for other in queue) > 1:
                queue.remove(row)
                break
        else:
            break
    return queue


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, 0.7, 0.9])
def test_limited_memory_is_a_queue_that_keeps_one_row_of_each_cluster(fraction):
    feats, labels, generator = random_set()
    memory = filled(feats, labels, fraction=fraction)
    names = labels.tolist()
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    queue = sorted((row for row in range(60) if names[row] >= 0), key=lambda row: order[row])
    capacity = 60 * round(fraction * 100) // 100
    queue = plain_queue(queue, names, capacity)
    held = feats.clone()
    for batch, rows in [(feats[:0], torch.zeros(0, dtype=torch.int64)), *batches(generator, labels)]:
        for feat, row in zip(batch, rows.tolist(), strict=True):
            held[row] = feat
        for row in dict.fromkeys(reversed(rows.tolist())):  # a repeated image queues where it stands last
            queue = [other for other in queue if other != row]
        queue = plain_queue([*queue, *reversed(dict.fromkeys(reversed(rows.tolist())))], names, capacity)
        if len(rows):
            memory.update(batch, rows)
        expected = torch.zeros(60, 8)
        expected[queue] = held[queue]
        assert_close(memory.features, expected, 0)
        assert ((memory.written >= 0).nonzero().flatten()).tolist() == sorted(queue)
        assert memory.counts.tolist() == [sum(names[row] == a for row in queue) for a in range(7)]
        assert len(queue) == max(min(capacity, int((labels >= 0).sum())), 7)
        assert_close(memory.centroids, torch.stack([expected[labels == a].sum(0) / memory.counts[a] for a in range(7)]))


def test_hardest_rows_by_a_plain_loop():
    feats, labels, generator = random_set()
    memory = filled(feats, labels)
    batch, rows = next(batches(generator, labels))
    own = labels[rows]
    batch.requires_grad_()
    found = memory.hardest(batch, own)
    for i in range(len(batch)):
        for a in range(7):
            members = [float(batch[i].detach() @ feats[row]) for row in range(60) if labels[row] == a]
            wanted = min(members) if a == int(own[i]) else max(members)
            assert found[i, a].item() == pytest.approx(wanted, abs=1e-6)
    (slope,) = torch.autograd.grad(found[0, own[0]], batch)
    worst = min(
        (row for row in range(60) if labels[row] == own[0]), key=lambda row: float(batch[0].detach() @ feats[row])
    )
    torch.testing.assert_close(slope[0], feats[worst])


def test_hardest_rows_are_rows_that_are_held():
    feats, labels, generator = random_set()
    memory = filled(feats, labels, fraction=0.05)  # one row of each cluster
    batch, rows = next(batches(generator, labels))
    torch.testing.assert_close(memory.hardest(batch, labels[rows]), batch @ memory.centroids.T)


@pytest.mark.parametrize("keys", [{}, {"fraction": 0.3}])
def test_a_resumed_memory_goes_on_as_the_first(keys):
    feats, labels, generator = random_set()
    memory = filled(feats, labels, **keys)
    other = filled(*random_set(images=20, clusters=3)[:2], **keys)
    steps = list(batches(generator, labels))
    for step in steps[:5]:
        memory.update(*step)
    other.load_state_dict(memory.state_dict())
    for step in steps[5:]:
        memory.update(*step)
        other.update(*step)
    assert {name: value.tolist() for name, value in other.state_dict().items()} == {
        name: value.tolist() for name, value in memory.state_dict().items()
    }


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, float("nan")])
def test_fraction_out_of_range(fraction):
    with pytest.raises(ValueError, match=r"MODEL\.MEMORY\.FRACTION is .*; a share in \(0, 1\] is accepted"):
        ReplacedMemory(4, fraction=fraction)


def test_labelled_sources_are_refused():
    feats, labels, _ = random_set()
    bank = FeatureBank(feats, torch.zeros(60), source_feats=feats, source_labels=labels.clamp_min(0))
    with pytest.raises(ValueError, match=r"labelled source images.*Drop DATASETS\.SOURCES"):
        ReplacedMemory(8).reset(PseudoLabels(labels, torch.zeros(7, 8)), bank)
