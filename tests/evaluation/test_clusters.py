from __future__ import annotations

import pytest
import torch

from fastreid_uns.evaluation.clusters import cluster_quality


def test_worked_by_hand():
    # clusters {a, a, b} and {b, b}; pairs: 3 + 1 in clusters, 1 + 3 in identities, 1 + 1 in both, of 10;
    # chance = 4 * 4 / 10 = 1.6; ARI = (2 - 1.6) / (4 - 1.6)
    quality = cluster_quality(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([7, 7, 3, 3, 3]))
    assert quality["ARI"] == pytest.approx(0.4 / 2.4)
    assert quality["purity"] == pytest.approx(4 / 5)
    assert 0 < quality["NMI"] < 1


def test_outliers_and_unknown_identities_do_not_count():
    labels = torch.tensor([0, 0, 1, 1, -1, -1, 1])
    identities = torch.tensor([5, 5, 6, 6, 5, 6, -1])
    assert cluster_quality(labels, identities) == {"ARI": 1.0, "NMI": 1.0, "purity": 1.0}


def test_purity_of_one_cluster_is_the_share_of_its_largest_identity():
    quality = cluster_quality(torch.zeros(10, dtype=torch.long), torch.tensor([1] * 6 + [2] * 4))
    assert quality["purity"] == pytest.approx(0.6)
    assert quality["ARI"] == pytest.approx(0)


def test_nothing_to_say_without_clusters_or_identities():
    assert cluster_quality(torch.tensor([-1, -1]), torch.tensor([1, 2])) == {}
    assert cluster_quality(torch.tensor([0, 0]), torch.tensor([-1, -1])) == {}


def test_row_counts_must_agree():
    with pytest.raises(ValueError, match="3 labels for 2 identities"):
        cluster_quality(torch.zeros(3), torch.zeros(2))
