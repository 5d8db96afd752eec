"""Pairs of images of one cluster."""

from __future__ import annotations

import pytest
import torch

from fastreid_uns.projects.ACFL.sampler import PartnerSampler
from fastreid_uns.structures import PseudoLabels

LABELS = torch.tensor([0, 1, -1, 0, 2, 1, 0, -1, 1, 0, 0, 1])  # five of cluster 0, four of 1, one of 2
PSEUDO = PseudoLabels(LABELS, torch.zeros(3, 2))


def pairs(length: int, rank: int = 0, world: int = 1, epoch: int = 0) -> torch.Tensor:
    sampler = PartnerSampler(length, 3, rank, world, batch_size=8)
    sampler.set_epoch(epoch, PSEUDO, torch.zeros(12, dtype=torch.int64))
    return torch.tensor(list(sampler)).view(-1, 2)


def test_partners_share_the_cluster_and_are_other_images_where_there_are_any():
    first, partner = pairs(300).unbind(1)
    assert torch.equal(LABELS[first], LABELS[partner])
    assert (LABELS[first] >= 0).all()
    assert set(first[first == partner].tolist()) == {4}


def test_first_images_are_passes_over_all_clustered_images():
    first = pairs(300)[:, 0].view(-1, 8)  # two batches of four are a pass; two of the ten images are left out of each
    assert all(len(set(one.tolist())) == 8 for one in first)
    assert set(first.flatten().tolist()) == set((LABELS >= 0).nonzero().flatten().tolist())


def test_partners_are_drawn_uniformly():
    first, partner = pairs(4000).unbind(1)
    for image in (0, 8):
        others = [i for i in range(12) if LABELS[i] == LABELS[image] and i != image]
        drawn = partner[first == image].bincount(minlength=12).float()
        torch.testing.assert_close(
            drawn[others] / drawn.sum(), torch.full((len(others),), 1 / len(others)), rtol=0, atol=0.04
        )


def test_processes_take_whole_pairs():
    whole = pairs(5).view(5, 8)
    halves = [pairs(5, rank, 2).view(5, 4) for rank in (0, 1)]
    assert torch.equal(torch.cat(halves, dim=1), whole)


def test_odd_batches_are_refused():
    with pytest.raises(ValueError, match=r"BATCH_SIZE 7 is no multiple of NUM_INSTANCES x processes \(2 x 1\)"):
        PartnerSampler(1, 0, 0, 1, batch_size=7)
