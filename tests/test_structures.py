import pytest
import torch

from fastreid_uns.structures import NoClusters, PseudoLabels


def test_counts_and_sizes():
    pseudo = PseudoLabels(torch.tensor([0, 1, -1, 1]), torch.eye(2))
    assert pseudo.num_clusters == 2
    assert pseudo.sizes.tolist() == [1, 2]


def test_only_outliers():
    with pytest.raises(NoClusters, match=r"every one of 3 images is an outlier.*EPS"):
        PseudoLabels(torch.full((3,), -1), torch.zeros(0, 2))


def test_gap_in_the_numbering():
    with pytest.raises(ValueError, match="labels run to 2 but 2 clusters exist"):
        PseudoLabels(torch.tensor([0, 2]), torch.eye(2))


def test_centroids_that_do_not_fit():
    with pytest.raises(ValueError, match="3 centroids for 2 clusters"):
        PseudoLabels(torch.tensor([0, 1]), torch.eye(3))


def test_extras_hold_a_row_for_each_image():
    with pytest.raises(ValueError, match=r"extras\['score'\] has 3 rows for 2 images"):
        PseudoLabels(torch.tensor([0, 1]), torch.eye(2), {"score": torch.zeros(3)})
