"""Questions about merges, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.photos.informative import informative_pairs, meeting_heights, refitted_threshold
from fastreid_uns.pseudo_labels.constraints import Answer, Constraints
from fastreid_uns.pseudo_labels.linkage import Dendrogram

# 0 and 1 merge at 0.2, 2 and 3 at 0.3, these two at 0.8, photo 4 joins at 0.82; 5 never does
TREE = Dendrogram(
    6, np.array([[0, 1], [2, 3], [6, 7], [4, 8]]), np.array([0.2, 0.3, 0.8, 0.82]), np.array([2, 2, 4, 5])
)
CHAINS = ((0, 22), (10, 31))  # first photos of groups of ten, and what is to be added for the node before
FEATS = F.normalize(torch.tensor([[1.0, 0], [1, 0.2], [0, 1], [0.1, 1], [-1, 0], [0, -1]]))


def test_the_merge_near_the_threshold_that_moves_most_is_asked_first():
    found = informative_pairs(TREE, FEATS, 0.8, 2)
    assert {found[0].first, found[0].second} & {0, 1}
    assert {found[0].first, found[0].second} & {2, 3}
    assert found[0].weight == pytest.approx(2 * 0.35 * 0.65)  # two photos, the chance at the threshold
    assert found[0].height == 0.8
    assert 4 in (found[1].first, found[1].second)


def test_large_groups_far_apart_come_after_small_ones_that_are_in_doubt():
    """Photos 0 to 9 and 10 to 19 are groups that meet at 0.9; 20, 21 and 22, 23 meet at the threshold."""
    chains = [[[first + 1, first], *([first + at, made + at] for at in range(2, 10))] for first, made in CHAINS]
    children = np.array([*chains[0], *chains[1], [20, 21], [22, 23], [42, 43], [32, 41]])
    heights = np.array([*[0.1] * 20, 0.8, 0.9])
    sizes = np.array([*range(2, 11), *range(2, 11), 2, 2, 4, 20])
    feats = F.normalize(torch.rand(24, 4, generator=torch.Generator().manual_seed(0)))
    found = informative_pairs(Dendrogram(24, children, heights, sizes), feats, 0.8, 2)
    assert [pair.height for pair in found] == [0.8, 0.9]


def test_answered_merges_are_left_out():
    constraints = Constraints(6, [Answer(0, 3, True)])
    found = informative_pairs(TREE, FEATS, 0.8, 9, constraints)
    assert [pair.height for pair in found] == [0.82, 0.3, 0.2]


def test_heights_at_which_photos_meet():
    pairs = np.array([[0, 1], [3, 2], [1, 2], [4, 0], [5, 0], [3, 3]])
    assert meeting_heights(TREE, pairs).tolist() == [0.2, 0.3, 0.8, 0.82, 1.0, 0.0]


def test_the_threshold_follows_the_answers():
    assert refitted_threshold(0.8, np.array([]), np.array([], bool)) == pytest.approx(0.8, abs=0.003)
    heights = np.array([0.80, 0.82, 0.84, 0.86])
    assert refitted_threshold(0.8, heights, np.ones(4, bool)) > 0.82
    assert refitted_threshold(0.8, heights - 0.06, np.zeros(4, bool)) < 0.79
    assert 0.78 < refitted_threshold(0.8, heights, np.array([True, True, False, False])) < 0.82
