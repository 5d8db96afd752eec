import pytest
import torch

from fastreid_uns.structures import Batch, NoClusters, PseudoLabels


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


def batch() -> Batch:
    """Four images of two views; the pixels of image i have the value i, in the second view 10 + i."""
    first = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    domains = torch.tensor([1, 0, 0, 0])
    return Batch((first, first + 10), torch.arange(4) + 20, torch.tensor([0, 5, 5, 6]), torch.arange(4), domains, 2)


@pytest.mark.parametrize(
    ("index", "rows", "most"),
    [(slice(1, 3), [1, 2], 2), (slice(0, None, 2), [0, 2], 2), (torch.tensor([3, 3, 0]), [3, 3, 0], None)],
)
def test_rows_of_a_batch_keep_everything_that_belongs_to_them(index, rows, most):
    part = batch().rows(index)
    assert [view[:, 0, 0, 0].tolist() for view in part.views] == [rows, [10 + row for row in rows]]
    assert part.index.tolist() == [20 + row for row in rows]
    assert part.labels.tolist() == [[0, 5, 5, 6][row] for row in rows]
    assert part.cameras.tolist() == rows
    assert part.domains.tolist() == [[1, 0, 0, 0][row] for row in rows]
    assert part.most == most


def test_a_batch_moves_as_a_whole_but_for_the_domains(device):
    moved = batch().to(device)
    assert {value.device.type for value in (*moved.views, moved.index, moved.labels, moved.cameras)} == {device.type}
    assert moved.domains.device.type == "cpu"
    assert moved.views[1].cpu()[:, 0, 0, 0].tolist() == [10, 11, 12, 13]
    assert moved.most == 2


@pytest.mark.gpu
def test_rows_are_chosen_on_the_device_without_waiting():
    held = batch().to(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        part = held.rows(torch.tensor([2, 0])), held.rows(slice(2, None))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert part[0].index.tolist() == [22, 20]
    assert part[1].index.tolist() == [22, 23]
