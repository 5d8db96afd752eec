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
FEATS = F.normalize(torch.tensor([[1.0, 0], [1, 0.2], [0, 1], [0.1, 1], [-1, 0], [0, -1]]))


def test_the_merge_near_the_threshold_that_changes_most_is_asked_first():
    found = informative_pairs(TREE, FEATS, 0.8, 2)
    assert {found[0].first, found[0].second} & {0, 1}
    assert {found[0].first, found[0].second} & {2, 3}
    assert found[0].weight == pytest.approx(4 * 0.35 * 0.65)  # four pairs, the chance at the threshold
    assert found[0].height == 0.8
    assert 4 in (found[1].first, found[1].second)


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
