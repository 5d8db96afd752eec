import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns.data.augment import Augment
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.loader import TrainLoader
from fastreid_uns.data.samplers import ClusterSampler, JointSampler, RandomSampler
from fastreid_uns.data.train_set import TrainSet
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


def make(records, views=None) -> TrainLoader:
    sampler = ClusterSampler(4, 0, 0, 1, batch_size=4, num_instances=2, camera_aware=False)
    return TrainLoader(TrainSet(ImageSet(records, SIZE)), sampler, views or [Augment(**WEAK)], seed=0, device="cpu")


def cluster(loader: TrainLoader, labels: torch.Tensor = LABELS, epoch: int = 0) -> None:
    loader.train_set.pseudo = PseudoLabels(labels, torch.zeros(int(labels.max()) + 1, 2))
    loader.plan(epoch)


def test_batches_hold_what_belongs_to_their_images(records):
    loader = make(records[:6])
    cluster(loader)
    batches = list(loader.epoch(0))
    assert len(batches) == 4
    for batch in batches:
        assert batch.views[0].shape == (4, 3, *SIZE)
        assert torch.equal((batch.views[0][:, 0, 0, 0] * 255).round().long(), 10 * batch.index)
        assert torch.equal(batch.labels, LABELS[batch.index])
        assert torch.equal(batch.cameras, batch.index % 3)
        assert batch.domains.tolist() == [0, 0, 0, 0]
        assert {value.dtype for value in (batch.index, batch.labels, batch.cameras, batch.domains)} == {torch.int64}
        assert batch.labels.bincount().max() == batch.most == 2


def test_the_bound_is_that_of_the_whole_batch_in_every_process(records):
    """Batches of six images of three clusters, two of each; a process sees one cluster of each batch."""
    bounds = []
    for rank in range(3):
        sampler = ClusterSampler(2, 0, rank, 3, batch_size=6, num_instances=2)
        loader = TrainLoader(TrainSet(ImageSet(records[:6], SIZE)), sampler, [Augment(**WEAK)], seed=0, device="cpu")
        cluster(loader, torch.tensor([0, 0, 0, 0, 0, 1]))  # too few clusters: one comes twice
        bounds.append({batch.most for batch in loader.epoch(0)})
    assert bounds == [{4}] * 3


def test_new_labels_reach_the_next_plan(records):
    loader = make(records[:6])
    cluster(loader)
    list(loader.epoch(0))
    other = torch.tensor([1, -1, 0, 1, 0, 2])
    cluster(loader, other, epoch=1)
    for batch in loader.epoch(1):
        assert torch.equal(batch.labels, other[batch.index])


def test_each_view_step_and_epoch_has_its_own_numbers(records):
    shifted = Augment(flip=0, pad=3, erase=0)
    loader = make([records[5]] * 6, [shifted, shifted, Augment(**WEAK)])
    epochs = {}
    for epoch in (0, 1):
        cluster(loader)  # the same plan
        epochs[epoch] = list(loader.epoch(epoch))
    views = [batch.views[number] for epoch in (0, 1) for batch in epochs[epoch] for number in (0, 1)]
    assert len({view.numpy().tobytes() for view in views}) == 2 * 4 * 2
    assert all(torch.equal(batch.views[2], torch.full((4, 3, *SIZE), 50) / 255) for batch in epochs[0])


def test_an_epoch_left_early_does_not_change_the_next(records):
    loader, other = make(records[:6], [Augment()]), make(records[:6], [Augment()])
    for one in (loader, other):
        cluster(one)
    next(loader.epoch(0))
    for a, b in zip(loader.epoch(1), other.epoch(1), strict=True):
        assert torch.equal(a.views[0], b.views[0])


def test_source_classes_are_numbered_before_the_clusters(records):
    """Six target images, then four of two source sets with three classes."""
    train_set = TrainSet(
        ImageSet(records, SIZE),
        domains=torch.tensor([0] * 6 + [1, 1, 2, 2]),
        classes=torch.tensor([-1] * 6 + [0, 1, 2, 2]),
    )
    where = (6, 0, 0, 1)
    target = ClusterSampler(*where, batch_size=4, num_instances=2)
    sources = [RandomSampler(*where, batch_size=2), RandomSampler(*where, batch_size=2)]
    sampler = JointSampler(target, sources, train_set)
    loader = TrainLoader(train_set, sampler, [Augment(**WEAK)], seed=0, device="cpu")
    cluster(loader)
    rows = torch.tensor([3, 4, 3, 4, -1, 3, 0, 1, 2, 2])
    for batch in loader.epoch(0):
        assert batch.domains.tolist() == [1, 1, 2, 2, 0, 0, 0, 0]
        assert torch.equal(batch.labels, rows[batch.index])
        assert torch.equal(batch.cameras, batch.index % 3)
        assert torch.equal((batch.views[0][:, 0, 0, 0] * 255).round().long(), 10 * batch.index)


def test_what_is_missing_or_odd_is_said(records):
    loader = make(records[:6])
    with pytest.raises(RuntimeError, match=r"train loader: no epoch was planned; call plan\(epoch\)"):
        next(loader.epoch(0))
    with pytest.raises(RuntimeError, match=r"train loader: there are no labels yet; write train_set\.pseudo"):
        loader.plan(0)
    with pytest.raises(ValueError, match=r"INPUT\.VIEWS is empty"):
        TrainLoader(loader.train_set, loader.sampler, [], seed=0, device="cpu")
