import logging
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats

from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.samplers import ClusterSampler, JointSampler, RandomSampler
from fastreid_uns.data.train_set import TrainSet
from fastreid_uns.structures import PseudoLabels, Record


def pseudo(*labels: int) -> PseudoLabels:
    return PseudoLabels(torch.tensor(labels), torch.zeros(max(labels) + 1, 2))


def unknown(labels: PseudoLabels) -> torch.Tensor:
    return torch.full((len(labels.labels),), -1)


def groups(sampler, labels, cameras=None, epoch=0) -> np.ndarray:
    """(groups,K) indices of an epoch."""
    sampler.set_epoch(epoch, labels, unknown(labels) if cameras is None else torch.tensor(cameras))
    return np.array(list(sampler)).reshape(-1, sampler.num_instances)


def test_other_cameras_come_before_the_own_one():
    """Images 0-2 from camera 0, 3-5 from cameras 1 and 2: the others never share the anchor's camera."""
    labels, cameras = pseudo(0, 0, 0, 0, 0, 0), [0, 0, 0, 1, 2, 2]
    sampler = ClusterSampler(300, 0, 0, 1, batch_size=4, num_instances=4)
    of_camera_0 = 0
    for anchor, *others in groups(sampler, labels, cameras):
        assert all(cameras[other] != cameras[anchor] for other in others)
        if cameras[anchor] == 0:  # exactly three candidates
            of_camera_0 += 1
            assert set(others) == {3, 4, 5}
        if cameras[anchor] == 1:  # five candidates
            assert len(set(others)) == 3
    assert of_camera_0 > 100


def test_one_camera_falls_back_to_the_other_images_of_it():
    """With exactly K - 1 candidates there are no repeats."""
    sampler = ClusterSampler(50, 0, 0, 1, batch_size=4, num_instances=4)
    for group in groups(sampler, pseudo(0, 0, 0, 0), [2, 2, 2, 2]):
        assert sorted(group) == [0, 1, 2, 3]


def test_an_unknown_camera_is_no_preference():
    """Two images of camera 0 and two unknown ones: an unknown anchor takes all, a known one only the unknown."""
    sampler = ClusterSampler(200, 0, 0, 1, batch_size=3, num_instances=3)
    seen = {anchor: Counter() for anchor in range(4)}
    for anchor, *others in groups(sampler, pseudo(0, 0, 0, 0), [0, 0, -1, -1]):
        seen[anchor].update(others)
    assert [set(seen[anchor]) for anchor in range(4)] == [{2, 3}, {2, 3}, {0, 1, 3}, {0, 1, 2}]


def test_cameras_can_be_ignored():
    labels, cameras = pseudo(0, 0, 0), [0, 0, 1]
    sampler = ClusterSampler(50, 0, 0, 1, batch_size=3, num_instances=3, camera_aware=False)
    assert all(sorted(group) == [0, 1, 2] for group in groups(sampler, labels, cameras))


def test_too_few_candidates_are_repeated():
    sampler = ClusterSampler(50, 0, 0, 1, batch_size=4, num_instances=4)
    for anchor, *others in groups(sampler, pseudo(0, 0), [0, 1]):
        assert others == [1 - anchor] * 3


def test_a_lone_image_fills_its_group():
    found = groups(ClusterSampler(2, 0, 0, 1, batch_size=8, num_instances=4), pseudo(-1, 0, 1, 1))
    assert sum(group.tolist() == [1, 1, 1, 1] for group in found) == 2


def test_anchors_and_others_are_uniform():
    """Of five images of one camera, each is the anchor equally often, and so is each ordered pair of others."""
    sampler = ClusterSampler(12_000, 0, 0, 1, batch_size=3, num_instances=3)
    found = groups(sampler, pseudo(-1, 0, 0, 0, 0, 0))
    triples = Counter(map(tuple, found.tolist()))
    assert len(triples) == 5 * 4 * 3
    assert stats.chisquare(list(triples.values())).pvalue > 1e-3


def test_a_batch_holds_different_clusters_and_a_pass_all_of_them():
    """Six clusters, three in a batch: two batches are one pass."""
    labels = pseudo(*(i % 6 for i in range(24)))
    sampler = ClusterSampler(40, 0, 0, 1, batch_size=12, num_instances=4)
    clusters = labels.labels.numpy()[groups(sampler, labels)]
    assert (clusters == clusters[:, :1]).all()
    for one_pass in clusters[:, 0].reshape(-1, 6):
        assert sorted(one_pass) == list(range(6))


def test_what_does_not_fill_a_batch_is_left_out_of_the_pass():
    """Five clusters, two in a batch: four of each pass are used, every cluster now and then."""
    labels = pseudo(*(i % 5 for i in range(20)))
    sampler = ClusterSampler(40, 0, 0, 1, batch_size=8, num_instances=4)
    passes = labels.labels.numpy()[groups(sampler, labels)][:, 0].reshape(-1, 4)
    assert all(len(set(one_pass)) == 4 for one_pass in passes)
    assert set(passes.ravel()) == set(range(5))


def test_too_few_clusters_are_repeated_with_one_warning(caplog):
    labels = pseudo(0, 0, 1, 1, 1)
    sampler = ClusterSampler(3, 0, 0, 1, batch_size=12, num_instances=2)
    with caplog.at_level(logging.WARNING):
        found = groups(sampler, labels)
        groups(sampler, labels, epoch=1)
    assert found.shape == (18, 2)
    assert Counter(labels.labels[found[:, 0]].tolist()) == {0: 9, 1: 9}
    assert caplog.text.count("2 clusters give 4 of the 12 images of a batch") == 1


def test_short_groups_give_lone_images_one_row():
    """A pass over clusters of 1, 1, 3 and 4 images with K = 3 has 1 + 1 + 3 + 3 rows: two batches of four."""
    labels = pseudo(0, 1, 2, 2, 2, 3, 3, 3, 3)
    sampler = ClusterSampler(60, 0, 0, 1, batch_size=12, num_instances=3, short_groups=True)
    sampler.set_epoch(0, labels, unknown(labels))
    flat = labels.labels[torch.tensor(list(sampler))].flatten()
    for one_pass in flat.view(-1, 8):
        assert Counter(one_pass.tolist()) == {0: 1, 1: 1, 2: 3, 3: 3}


def test_short_groups_drop_what_does_not_fill_a_batch():
    """Nine lone images and batches of four: eight of each pass are used."""
    labels = pseudo(*range(9))
    sampler = ClusterSampler(30, 0, 0, 1, batch_size=4, num_instances=2, short_groups=True)
    sampler.set_epoch(0, labels, unknown(labels))
    for one_pass in np.array(list(sampler)).reshape(-1, 8):
        assert len(set(one_pass)) == 8


def test_random_batches_do_not_repeat_within_a_pass():
    labels = pseudo(0, -1, 1, 1, 0, -1, 2, 2, 2)
    sampler = RandomSampler(30, 0, 0, 1, batch_size=3)
    sampler.set_epoch(0, labels, unknown(labels))
    passes = np.array(list(sampler)).reshape(-1, 6)
    assert all(len(set(one_pass)) == 6 for one_pass in passes)
    assert set(passes.ravel()) == {0, 2, 3, 4, 6, 7, 8}


def test_random_batches_larger_than_the_set_repeat_images():
    labels = pseudo(0, 0, 1)
    sampler = RandomSampler(5, 0, 0, 1, batch_size=6)
    sampler.set_epoch(0, labels, unknown(labels))
    assert all(Counter(batch) == {0: 2, 1: 2, 2: 2} for batch in sampler)


def test_batches_must_be_cut_evenly():
    with pytest.raises(
        ValueError,
        match=r"^DATALOADER\.SAMPLER\.BATCH_SIZE 100 is no multiple of NUM_INSTANCES x processes \(16 x 4\)\.$",
    ):
        ClusterSampler(1, 0, 0, 4, batch_size=100)
    with pytest.raises(ValueError, match=r"BATCH_SIZE 100 is no multiple of processes \(3\)"):
        RandomSampler(1, 0, 0, 3, batch_size=100)
    with pytest.raises(ValueError, match="BATCH_SIZE 0"):
        RandomSampler(1, 0, 0, 1, batch_size=0)
    with pytest.raises(ValueError, match="NUM_INSTANCES is 0"):
        ClusterSampler(1, 0, 0, 1, num_instances=0)


def test_a_plan_needs_labels_and_as_many_cameras():
    sampler = RandomSampler(1, 0, 0, 1, batch_size=2)
    with pytest.raises(RuntimeError, match="RandomSampler: there is no plan yet; call set_epoch"):
        next(iter(sampler))
    with pytest.raises(ValueError, match="3 labels and 2 cameras"):
        sampler.set_epoch(0, pseudo(0, 0, 0), torch.zeros(2))


# two source sets, of four and two images in mixed order; true classes numbered over both
SOURCE_LABELS = torch.tensor([0, 0, 2, 1, 1, 2])
SOURCE_DOMAINS = torch.tensor([1, 1, 2, 1, 1, 2])


def table(unlabelled: int, domains: torch.Tensor, classes: torch.Tensor) -> TrainSet:
    """Unlabelled images, then those of the source sets; nothing is decoded."""
    images = ImageSet([Record("", -1, 0)] * (unlabelled + len(domains)), (8, 4))
    first = torch.zeros(unlabelled, dtype=torch.int64)
    return TrainSet(images, domains=torch.cat([first, domains]), classes=torch.cat([first - 1, classes]))


def joint(rank: int = 0, world: int = 1, length: int = 5) -> JointSampler:
    where = (length, 0, rank, world)
    target = ClusterSampler(*where, batch_size=8, num_instances=2)
    sources = [ClusterSampler(*where, batch_size=4, num_instances=2), RandomSampler(*where, batch_size=2)]
    return JointSampler(target, sources, table(20, SOURCE_DOMAINS, SOURCE_LABELS))


TARGET = pseudo(*(i % 5 - 1 for i in range(20)))


def test_joint_batches_hold_each_source_and_then_the_target():
    sampler = joint()
    sampler.set_epoch(0, TARGET, unknown(TARGET))
    assert (len(sampler), sampler.batch_size) == (5, 14)
    for batch in sampler:
        first, second, target = batch[:4], batch[4:6], batch[6:]
        assert set(first) == {20, 21, 23, 24}  # two classes, two images of each
        assert set(second) == {22, 25}
        assert SOURCE_LABELS[first[0] - 20] == SOURCE_LABELS[first[1] - 20]
        assert all(TARGET.labels[a] == TARGET.labels[b] >= 0 for a, b in zip(target[::2], target[1::2], strict=True))


def test_a_joint_pass_is_one_over_the_target():
    """8 images of the target in a batch: 16 clustered ones give two batches, 8 one, and 2 one."""
    sampler = joint(length=0)
    sampler.set_epoch(0, TARGET, unknown(TARGET))
    assert [len(batch) for batch in sampler] == [14, 14]
    few = pseudo(*([0, 1] * 4 + [-1] * 12))
    sampler.set_epoch(1, few, unknown(few))
    assert len(sampler) == len(list(sampler)) == 1
    none_full = pseudo(*([0, 1] + [-1] * 18))
    sampler.set_epoch(2, none_full, unknown(none_full))
    assert len(sampler) == 1


def test_joint_slices_hold_a_share_of_each_part():
    whole, halves = joint(), [joint(rank, 2) for rank in range(2)]
    for sampler in (whole, *halves):
        sampler.set_epoch(3, TARGET, unknown(TARGET))
    assert [half.rows.tolist() for half in halves] == [[0, 1, 4, 6, 7, 8, 9], [2, 3, 5, 10, 11, 12, 13]]
    for batch, *slices in zip(whole, *halves, strict=True):
        assert [[batch[row] for row in half.rows] for half in halves] == slices


def test_joint_parts_draw_from_streams_of_their_own():
    """Source and target with equal seeds and equal labels: their batches differ."""
    where = (20, 0, 0, 1)
    labels = pseudo(*(i // 2 for i in range(40)))
    sampler = JointSampler(
        RandomSampler(*where, batch_size=10),
        [RandomSampler(*where, batch_size=10)],
        table(40, torch.ones(40, dtype=torch.int64), labels.labels),
    )
    sampler.set_epoch(0, labels, unknown(labels))
    batches = np.array(list(sampler))
    assert (batches[:, :10] - 40 == batches[:, 10:]).mean() < 0.2


def test_joint_parts_must_agree():
    one = RandomSampler(5, 0, 0, 1, batch_size=2)
    two = table(20, SOURCE_DOMAINS, SOURCE_LABELS)
    with pytest.raises(ValueError, match=r"1 source samplers for the domains \[1, 2\]; domains must count 1\.\.1"):
        JointSampler(one, [one], two)
    with pytest.raises(ValueError, match=r"samplers have \[5, 5, 4\] batches"):
        JointSampler(one, [one, RandomSampler(4, 0, 0, 1, batch_size=2)], two)


def test_most_images_of_one_label_in_a_batch():
    labels = pseudo(*range(8), *range(8), *range(8))
    sampler = ClusterSampler(5, 0, 0, 1, batch_size=6, num_instances=3)
    with pytest.raises(RuntimeError, match="no plan yet"):
        sampler.most_of_one(labels.labels)
    sampler.set_epoch(0, labels, unknown(labels))
    assert sampler.most_of_one(labels.labels) == 3
    assert sampler.most_of_one(torch.arange(24)) == 1
    assert sampler.most_of_one(torch.zeros(24, dtype=torch.long)) == 6
    repeated = ClusterSampler(5, 0, 0, 1, batch_size=6, num_instances=3)
    repeated.set_epoch(0, pseudo(0, 0), torch.tensor([-1, -1]))
    assert repeated.most_of_one(torch.tensor([0, 0])) == 6
