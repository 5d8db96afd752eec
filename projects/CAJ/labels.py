"""The two halves of the camera-aware distance, each of which can be exchanged for that of the plain one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.dbscan import DBSCANLabels
from fastreid_uns.pseudo_labels.jaccard import (
    Neighbours,
    average_listed,
    camera_lists,
    mutual_weights,
    reciprocal_sets,
    set_weights,
)
from fastreid_uns.pseudo_labels.search.exact import nearest_neighbours
from fastreid_uns.registry import PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import FeatureBank

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

NEIGHBOURS = ("camera", "joint")


@PSEUDO_LABEL_REGISTRY.register()
class CameraJaccardParts(DBSCANLabels):
    """DBSCAN over a Jaccard distance whose sets and whose averages are camera-aware or not, for ablations.

    Args:
        sets: `camera`: neighbours that are mutual in the list of the own camera or in that of the others (CKRNN).
            `joint`: the expanded k-reciprocal sets of one list of all images.
        averages: `camera`: over the K2_INTRA nearest of the own camera and the K2_INTER nearest of the others (CLQE).
            `joint`: over the K2 nearest of all images.
        keys: those of `DBSCANLabels`; K1 does **not** count the image itself here, as in the code of the paper.

    Raises:
        ValueError: a parameter out of range, or DISTANCE or SEARCH other than that of this class.

    Source: Chen et al. 2024 (CA-Jaccard), switches of the official code. Both `camera` is DISTANCE `camera_jaccard`.
    """

    def __init__(
        self, *, sets: str = "camera", averages: str = "camera", distance: str = "camera_jaccard", **keys: Any
    ) -> None:
        super().__init__(distance=distance, **keys)
        if distance != "camera_jaccard":
            raise InvalidValue(
                f"PSEUDO_LABELS: DISTANCE is {distance!r}; CameraJaccardParts takes camera_jaccard apart. Leave it, or "
                f"set NAME to DBSCANLabels."
            )
        for key, value in (("SETS", sets), ("AVERAGES", averages)):
            if value not in NEIGHBOURS:
                raise InvalidValue(f"PSEUDO_LABELS: {key} is {value!r}; accepted: {', '.join(NEIGHBOURS)}. Change it.")
        self.sets, self.averages = sets, averages

    def encoding(self, bank: FeatureBank, epoch: int) -> csr_matrix:
        """Weights of the SETS, averaged over the images that AVERAGES names."""
        k2_intra, k2_inter = self.camera_k2(epoch)
        own, others = camera_lists(
            bank.feats, bank.cameras, max(self.k1_intra + 1, k2_intra), max(self.k1_inter + 1, k2_inter)
        )
        joint = joint_list(bank.feats, max(self.k1 + 1, self.k2))
        if self.sets == "camera":
            weights = mutual_weights([own.first(self.k1_intra + 1), others.first(self.k1_inter + 1)])
        else:
            weights = expanded_weights(bank.feats, joint.first(self.k1 + 1), self.k1)
        if self.averages == "camera":
            return average_listed(weights, [own.first(k2_intra), others.first(k2_inter)])
        return average_listed(weights, [joint.first(self.k2)])


def joint_list(feats: Tensor, k: int) -> Neighbours:
    """The k nearest of all images, the image itself first; as many as there are."""
    return Neighbours(*(values.cpu().numpy() for values in nearest_neighbours(feats, min(k, len(feats)))))


def expanded_weights(feats: Tensor, neighbours: Neighbours, k1: int) -> csr_matrix:
    """Softmax of the negative distances over the expanded k-reciprocal sets: (N, N) CSR float64, rows sum to 1.

    Args:
        feats: (N, D) unit length.
        neighbours: all of whose columns vote.
        k1: see `reciprocal_sets`.
    """
    from scipy.sparse import csr_matrix

    lists = (torch.from_numpy(np.ascontiguousarray(values)) for values in neighbours)
    sets, distances = reciprocal_sets(feats, *lists, k1)
    weights = set_weights(sets, distances, lambda images, squared: squared)
    n = len(feats)
    return csr_matrix((weights, sets.order[sets.members], sets.starts), shape=(n, n))[sets.place]
