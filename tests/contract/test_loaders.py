"""Equal seeds give equal batches: decoded or cached, with any number of workers, in any number of processes."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastreid_uns.data.augment import Augment
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.loader import TrainLoader
from fastreid_uns.data.pixel_cache import CachedImageSet
from fastreid_uns.data.samplers import ClusterSampler, JointSampler
from fastreid_uns.data.train_set import TrainSet
from fastreid_uns.structures import Batch, PseudoLabels, Record

SIZE = (16, 8)
CLASSES, DOMAINS = torch.tensor([-1] * 16 + [0, 0, 1, 1]), torch.tensor([0] * 16 + [1] * 4)
FULL = {"resized_crop": (0.6, 1.0), "rotation": 10.0, "jitter": 0.5, "brightness": 0.3, "hue": 0.1, "blur": 0.5}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (30, 20, 3), np.uint8)).save(folder / f"{i}.jpg")
    return [Record(str(folder / f"{i}.jpg"), -1, i % 3) for i in range(20)]


def batches(images: ImageSet, joint: bool = False, rank: int = 0, world: int = 1) -> list[Batch]:
    """Two epochs of two views."""
    where = (3, 5, rank, world)
    sampler = ClusterSampler(*where, batch_size=8, num_instances=2)
    train_set = TrainSet(images)
    if joint:
        train_set = TrainSet(images, domains=DOMAINS, classes=CLASSES)
        sampler = JointSampler(sampler, [ClusterSampler(*where, batch_size=4, num_instances=2)], train_set)
    train_set.pseudo = PseudoLabels(torch.arange(train_set.num_images) % 5 - 1, torch.zeros(4, 2))
    loader = TrainLoader(train_set, sampler, [Augment(pad=3), Augment(**FULL)], seed=5, device="cpu")
    found = []
    for epoch in range(2):
        loader.plan(epoch)
        found += loader.epoch(epoch)
    return found


def assert_equal(first: list[Batch], second: list[Batch]) -> None:
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))
        for name in ("index", "labels", "cameras", "domains"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.most == b.most


@pytest.fixture(scope="module")
def expected(records):
    return batches(ImageSet(records, SIZE))


def test_workers_change_nothing(records, expected):
    assert_equal(batches(ImageSet(records, SIZE, workers=2)), expected)


@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_a_cache_changes_nothing(records, expected, where, tmp_path):
    assert_equal(batches(CachedImageSet(ImageSet(records, SIZE), where=where, folder=tmp_path)), expected)


@pytest.mark.parametrize("joint", [False, True])
def test_slices_of_two_processes_make_up_the_batch_of_one(records, joint):
    images = ImageSet(records, SIZE)
    whole, *halves = (batches(images, joint, rank, world) for rank, world in ((0, 1), (0, 2), (1, 2)))
    # rows: two source and four target images of each process, or four target images
    rows = [[0, 1, 4, 5, 6, 7], [2, 3, 8, 9, 10, 11]] if joint else [[0, 1, 2, 3], [4, 5, 6, 7]]
    for half, own in zip(halves, rows, strict=True):
        for batch, part in zip(whole, half, strict=True):
            assert torch.equal(batch.index[own], part.index)
            assert torch.equal(batch.labels[own], part.labels)
            assert torch.equal(batch.domains[own], part.domains)
            assert batch.most == part.most
            for view, slice_ in zip(batch.views, part.views, strict=True):
                torch.testing.assert_close(view[own], slice_, rtol=0, atol=1e-6)


@pytest.mark.gpu
def test_cpu_and_gpu_give_the_same_views(records):
    images, cached = ImageSet(records, SIZE), CachedImageSet(ImageSet(records, SIZE), where="device", device="cuda")
    for name, view in {"plain": Augment(pad=3), "full": Augment(**FULL)}.items():
        draws = view.sample_parameters(8, SIZE, torch.Generator().manual_seed(0))
        ids = [list(range(8))]
        (host,), (device,), (copied,) = (
            images.stream(ids, "cpu"),
            cached.stream(ids, "cuda"),
            images.stream(ids, "cuda"),
        )
        assert torch.equal(device.cpu(), host), name
        assert torch.equal(copied.cpu(), host), name
        torch.testing.assert_close(view(device, draws).cpu(), view(host, draws), rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_batches_are_not_written_over_while_the_gpu_is_behind(records):
    found = {}
    for device in ("cpu", "cuda"):
        sampler = ClusterSampler(40, 5, 0, 1, batch_size=8, num_instances=2)
        train_set = TrainSet(CachedImageSet(ImageSet(records, SIZE), where="device", device=device))
        train_set.pseudo = PseudoLabels(torch.arange(20) % 5 - 1, torch.zeros(4, 2))
        loader = TrainLoader(train_set, sampler, [Augment()], seed=5, device=device)
        loader.plan(0)
        found[device] = []
        for batch in loader.epoch(0):
            if device == "cuda":
                torch.cuda._sleep(20_000_000)  # cycles, about 10 ms
            found[device].append(batch.views[0] + batch.labels[:, None, None, None])
            del batch
    assert len(found["cuda"]) == 40
    assert torch.equal(torch.stack(found["cuda"]).cpu(), torch.stack(found["cpu"]))
