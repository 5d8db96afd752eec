"""k-means with single images, on features small enough to work by hand."""

from __future__ import annotations

import io
import math

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns.projects.TMP.labels import ReliableKMeansLabels
from fastreid_uns.pseudo_labels.kmeans import KMeansLabels
from fastreid_uns.structures import FeatureBank


def bank(angles: list[float]) -> FeatureBank:
    """Unit vectors of a plane."""
    turn = torch.tensor(angles)
    return FeatureBank(torch.stack([turn.cos(), turn.sin()], dim=1), torch.zeros(len(angles), dtype=torch.int64))


# two clusters: 0 with its mean at 0.0 and two images at 0.6 from it, 1 with all images at one place
ANGLES = [-0.6, 0.0, 0.0, 0.0, 0.6, 3.0, 3.0]


def test_doubtful_images_stand_alone():
    found = ReliableKMeansLabels(num_clusters=2, similarity=math.cos(0.5))(bank(ANGLES), 0)
    sure = [found.labels[1:4].unique().tolist(), found.labels[5:].unique().tolist()]
    assert sorted(sure) == [[0], [1]]
    assert found.labels[[0, 4]].tolist() == [2, 3]
    expected = bank([0.0, 3.0] if sure[0] == [0] else [3.0, 0.0]).feats
    torch.testing.assert_close(found.centroids[:2], expected)
    torch.testing.assert_close(found.centroids[2:], bank([-0.6, 0.6]).feats)


def test_a_cluster_without_a_sure_image_is_gone():
    """Its two images are at right angles, so that both are at 45 degrees from their mean."""
    found = ReliableKMeansLabels(num_clusters=2, similarity=0.9)(bank([0.0, math.pi / 2, 4.0, 4.0, 4.0]), 0)
    assert found.labels.tolist() == [1, 2, 0, 0, 0]


def test_the_bound_itself_is_near_enough():
    feats = F.normalize(torch.tensor([[3.0, 4.0], [3.0, -4.0]]))
    pair = FeatureBank(feats, torch.zeros(2, dtype=torch.int64))
    assert ReliableKMeansLabels(num_clusters=1, similarity=0.599)(pair, 0).labels.tolist() == [0, 0]
    assert ReliableKMeansLabels(num_clusters=1, similarity=0.601)(pair, 0).labels.tolist() == [0, 1]


def test_any_similarity_gives_plain_k_means():
    feats = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    every = FeatureBank(feats, torch.zeros(50, dtype=torch.int64))
    plain = KMeansLabels(num_clusters=7)(every, 0)
    found = ReliableKMeansLabels(num_clusters=7, similarity=-1)(every, 0)
    assert torch.equal(found.labels, plain.labels)
    torch.testing.assert_close(found.centroids, plain.centroids)


def test_equal_input_gives_equal_labels_and_a_resumed_generator_goes_on():
    feats = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(1)))
    every = FeatureBank(feats, torch.zeros(50, dtype=torch.int64))
    first, second = (ReliableKMeansLabels(num_clusters=7, similarity=0.6) for _ in range(2))
    before = first(every, 0)
    assert before.num_clusters > 7
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(first(every, 1).labels, second(every, 1).labels)


def test_parameters_out_of_range():
    with pytest.raises(ValueError, match=r"PSEUDO_LABELS: SIMILARITY is 1\.5; a cosine in -1\.\.1"):
        ReliableKMeansLabels(similarity=1.5)
    with pytest.raises(ValueError, match="NUM_CLUSTERS is 0"):
        ReliableKMeansLabels(num_clusters=0)
