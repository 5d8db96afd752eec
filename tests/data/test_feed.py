import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns.data.augment import Augment
from fastreid_uns.data.feed import Feed
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.samplers import ClusterSampler, JointSampler, RandomSampler
from fastreid_uns.structures import PseudoLabels, Record

SIZE = (8, 4)
WEAK = {"flip": 0.0, "pad": 0, "erase": 0.0}
LABELS = torch.tensor([0, 1, 0, 1, -1, 0])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Ten images; image i is filled with the value 10 i."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(10):
        Image.fromarray(np.full((*SIZE, 3), 10 * i, np.uint8)).save(folder / f"{i}.png")
    return [Record(str(folder / f"{i}.png"), -1, i % 3) for i in range(10)]


def make(records, views=None, sampler=None, **keys) -> Feed:
    images = ImageSet(records, SIZE)
    sampler = sampler or ClusterSampler(4, 0, 0, 1, batch_size=4, num_instances=2)
    return Feed(images, sampler, views or [Augment(**WEAK)], seed=0, device="cpu", cameras=images.cameras, **keys)


def cluster(feed: Feed, labels: torch.Tensor = LABELS, epoch: int = 0) -> None:
    pseudo = PseudoLabels(labels, torch.zeros(int(labels.max()) + 1, 2))
    feed.labels = labels
    feed.sampler.set_epoch(epoch, pseudo, torch.full((len(labels),), -1))


def test_batches_hold_what_belongs_to_their_images(records):
    feed = make(records[:6])
    cluster(feed)
    batches = list(feed.epoch(0))
    assert len(batches) == 4
    for batch in batches:
        assert batch.views[0].shape == (4, 3, *SIZE)
        assert torch.equal((batch.views[0][:, 0, 0, 0] * 255).round().long(), 10 * batch.index)
        assert torch.equal(batch.labels, LABELS[batch.index])
        assert torch.equal(batch.cameras, batch.index % 3)
        assert batch.domains.tolist() == [0, 0, 0, 0]
        assert {value.dtype for value in batch[1:]} == {torch.int64}


def test_new_labels_reach_the_next_epoch(records):
    feed = make(records[:6])
    cluster(feed)
    list(feed.epoch(0))
    other = torch.tensor([1, -1, 0, 1, 0, 2])
    cluster(feed, other, epoch=1)
    assert torch.equal(feed.labels, other)
    for batch in feed.epoch(1):
        assert torch.equal(batch.labels, other[batch.index])


def test_each_view_step_and_epoch_has_its_own_numbers(records):
    feed = make([records[5]] * 6, [Augment(flip=0, pad=3, erase=0), Augment(flip=0, pad=3, erase=0), Augment(**WEAK)])
    cluster(feed)
    epochs = {}
    for epoch in (0, 1):
        feed.sampler.set_epoch(0, PseudoLabels(LABELS, torch.zeros(2, 2)), torch.zeros(6))
        epochs[epoch] = list(feed.epoch(epoch))
    views = [batch.views[number] for epoch in (0, 1) for batch in epochs[epoch] for number in (0, 1)]
    assert len({view.numpy().tobytes() for view in views}) == 2 * 4 * 2
    assert all(torch.equal(batch.views[2], torch.full((4, 3, *SIZE), 50) / 255) for batch in epochs[0])


def test_an_epoch_left_early_does_not_change_the_next(records):
    feed, other = make(records[:6], [Augment()]), make(records[:6], [Augment()])
    for one in (feed, other):
        cluster(one)
    next(feed.epoch(0))
    for a, b in zip(feed.epoch(1), other.epoch(1), strict=True):
        assert torch.equal(a.views[0], b.views[0])


def test_source_classes_are_numbered_before_the_clusters(records):
    """Six target images, then four of two source sets with three classes."""
    classes, domains = torch.tensor([0, 1, 2, 2]), torch.tensor([1, 1, 2, 2])
    where = (6, 0, 0, 1)
    sampler = JointSampler(
        ClusterSampler(*where, batch_size=4, num_instances=2),
        [RandomSampler(*where, batch_size=2), RandomSampler(*where, batch_size=2)],
        classes,
        domains,
        torch.full((4,), -1),
    )
    feed = make(records, sampler=sampler, source_labels=classes, source_domains=domains)
    cluster(feed)
    assert torch.equal(feed.labels, LABELS)
    rows = torch.tensor([3, 4, 3, 4, -1, 3, 0, 1, 2, 2])
    for batch in feed.epoch(0):
        assert batch.domains.tolist() == [1, 1, 2, 2, 0, 0, 0, 0]
        assert torch.equal(batch.labels, rows[batch.index])
        assert torch.equal(batch.cameras, batch.index % 3)
        assert torch.equal((batch.views[0][:, 0, 0, 0] * 255).round().long(), 10 * batch.index)


def test_what_is_missing_or_odd_is_said(records):
    feed = make(records[:6])
    with pytest.raises(RuntimeError, match="feed: there are no labels yet"):
        next(feed.epoch(0))
    with pytest.raises(RuntimeError, match="feed: there are no labels yet"):
        feed.labels  # noqa: B018
    with pytest.raises(ValueError, match=r"labels of shape \(5,\) for 6 unlabelled images"):
        feed.labels = LABELS[:5]
    with pytest.raises(ValueError, match=r"INPUT\.VIEWS is empty"):
        Feed(feed.images, feed.sampler, [], seed=0, device="cpu", cameras=feed.images.cameras)
    with pytest.raises(ValueError, match="6 images, 6 cameras, 2 source labels and 0 source domains"):
        make(records[:6], source_labels=torch.tensor([0, 0]))
