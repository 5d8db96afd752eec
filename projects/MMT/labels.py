"""k-means on the mean feature of both networks."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F

from fastreid_uns.pseudo_labels.kmeans import KMeansLabels
from fastreid_uns.registry import PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import FeatureBank, PseudoLabels


@PSEUDO_LABEL_REGISTRY.register()
class MutualKMeansLabels(KMeansLabels):
    """`KMeansLabels` of the mean of the features and of `extras["peer_feats"]` (N,D), as `MutualModel` extracts them.

    A bank without them is clustered as it is.

    Source: Ge et al. 2020 (MMT), official code; differs: the mean is brought to unit length, and k-means is spherical.
    """

    def __call__(self, bank: FeatureBank, epoch: int) -> PseudoLabels:
        if "peer_feats" in bank.extras:
            bank = replace(bank, feats=F.normalize(bank.feats + bank.extras["peer_feats"]))
        return super().__call__(bank, epoch)
