"""What every registered sampler must do."""

import pytest
import torch

from fastreid_uns import builtin  # noqa: F401
from fastreid_uns.registry import SAMPLER_REGISTRY
from fastreid_uns.structures import PseudoLabels

NAMES = [name for name, _ in SAMPLER_REGISTRY]
LENGTH, BATCH = 30, 24
generator = torch.Generator().manual_seed(0)
LABELS = torch.randint(-1, 9, (150,), generator=generator)  # outliers and nine clusters
CAMERAS = torch.randint(-1, 4, (150,), generator=generator)
PSEUDO = PseudoLabels(LABELS, torch.zeros(9, 2), {"proxy": LABELS.clone()})


def build(name: str, seed: int = 0, rank: int = 0, world: int = 1, length: int = LENGTH):
    keys = {"BATCH_SIZE": BATCH}
    if "num_instances" in SAMPLER_REGISTRY.schema(name):
        keys["NUM_INSTANCES"] = 4
    return SAMPLER_REGISTRY.build({"NAME": name, **keys}, length, seed, rank, world)


def plan(name: str, epoch: int = 0, **where) -> list[list[int]]:
    sampler = build(name, **where)
    sampler.set_epoch(epoch, PSEUDO, CAMERAS)
    return list(sampler)


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_has_its_length_in_full_batches(name):
    assert len(build(name)) == LENGTH
    assert [len(batch) for batch in plan(name)] == [BATCH] * LENGTH


@pytest.mark.parametrize("name", NAMES)
def test_without_a_length_an_epoch_is_one_pass_over_its_clustered_images(name):
    sampler = build(name, length=0)
    labels = LABELS.clone()
    for epoch, dropped in enumerate((0, 60)):
        labels[:dropped] = -1
        pseudo = PseudoLabels(labels, PSEUDO.centroids, PSEUDO.extras)
        sampler.set_epoch(epoch, pseudo, CAMERAS)
        assert len(sampler) == len(list(sampler)) == int((labels >= 0).sum()) // BATCH > 2
    assert len(sampler) < len(plan(name, length=0))


@pytest.mark.parametrize("name", NAMES)
def test_indices_are_plain_numbers_in_range_and_never_outliers(name):
    flat = [index for batch in plan(name) for index in batch]
    assert {type(index) for index in flat} == {int}
    assert all(0 <= index < 150 for index in flat)
    assert all(LABELS[index] >= 0 for index in flat)


@pytest.mark.parametrize("name", NAMES)
def test_every_cluster_is_visited(name):
    assert {int(LABELS[index]) for batch in plan(name) for index in batch} == set(range(9))


@pytest.mark.parametrize("name", [n for n in NAMES if "num_instances" in SAMPLER_REGISTRY.schema(n)])
def test_instances_of_a_cluster_stand_together(name):
    labels = LABELS[torch.tensor(plan(name))].view(-1, 4)
    assert (labels == labels[:, :1]).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", [2, 3])
def test_slices_of_the_processes_make_up_the_batch(name, world):
    slices = [plan(name, rank=rank, world=world) for rank in range(world)]
    for batch, *parts in zip(plan(name), *slices, strict=True):
        assert len({len(part) for part in parts}) == 1
        assert [index for part in parts for index in part] == batch


@pytest.mark.parametrize("name", NAMES)
def test_rows_say_which_part_of_the_batch_a_process_takes(name):
    samplers = [build(name, rank=rank, world=3) for rank in range(3)]
    assert torch.cat([sampler.rows for sampler in samplers]).tolist() == list(range(BATCH))
    assert {sampler.batch_size for sampler in samplers} == {BATCH}


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_and_the_epoch_decide(name):
    state = torch.get_rng_state()
    first = plan(name)
    assert plan(name) == first
    assert plan(name, seed=1) != first
    assert plan(name, epoch=1) != first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_can_be_read_again_and_is_replaced(name):
    sampler = build(name)
    sampler.set_epoch(0, PSEUDO, CAMERAS)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1, PSEUDO, CAMERAS)
    assert list(sampler) == plan(name, epoch=1)
