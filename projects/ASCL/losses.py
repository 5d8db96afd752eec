"""Sparse contrast: two positive pairs and N negative pairs for each cluster of the batch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import at_least_float32
from fastreid_uns.registry import LOSS_REGISTRY
from fastreid_uns.utils import comm


class SparsePairs(NamedTuple):
    """The cosine similarities that are contrasted, for each of C clusters."""

    hardest: Tensor  # (C,) least similar pair of the cluster
    easiest: Tensor  # (C,) most similar pair of two different images of it
    negatives: Tensor  # (C, N) most similar pairs across the border of the cluster, descending


def full_groups(labels: Tensor) -> Tensor:
    """Rows of the clusters that have their full number of images in the batch.

    The full number N is the one that most images of the batch share, images that are alone in their cluster left
    aside; where two numbers tie, the smaller one.

    Args:
        labels: (B,) on any device; for CUDA the host waits for it.

    Returns:
        (C, N) int64 on the CPU, rows of a cluster in their order; (0, 0) if every image is alone.
    """
    labels, order = labels.cpu().sort(stable=True)
    sizes = labels.unique_consecutive(return_counts=True)[1]
    size_of_row = sizes.repeat_interleave(sizes)
    shared = size_of_row[size_of_row > 1]
    if not len(shared):
        return labels.new_zeros(0, 0)
    full = int(shared.mode().values)
    return order[size_of_row == full].view(-1, full)


def sparse_pairs(feats: Tensor, groups: Tensor) -> SparsePairs:
    """The hardest and the easiest positive pair and the N most similar negative pairs of each cluster.

    Negatives are ranked over the whole cluster, not image by image: all N may share one image.

    Args:
        feats: (B, D) unit length.
        groups: (C, N) rows of each cluster, C and N at least 2, on the device of `feats`.

    Source: ASCL, official code. Memory: one (C N) x (C N) matrix.
    """
    clusters, size = groups.shape
    rows = feats[groups.flatten()]
    similarity = (rows @ rows.T).view(clusters, size, clusters, size).transpose(1, 2)  # (C, C, N, N) blocks
    own = similarity.diagonal(dim1=0, dim2=1).permute(2, 0, 1)
    upper = torch.ones(size, size, dtype=torch.bool, device=feats.device).triu(1)
    positives = own[:, upper]
    self_block = torch.eye(clusters, dtype=torch.bool, device=feats.device)[:, :, None, None]
    negatives = similarity.masked_fill(self_block, -torch.inf).flatten(1).topk(size, dim=1).values
    return SparsePairs(positives.min(1).values, positives.max(1).values, negatives)


def composite_contrast(pairs: SparsePairs, temperature: float) -> Tensor:
    """CSCL of each cluster, (C,): the one positive is the harmonic mean of hardest and easiest.

    With a, b hardest and easiest over the temperature, sigma = 2 e^a e^b / (e^a + e^b), and Z the sum of e^n over the
    negatives: log(1 + Z / sigma).

    Source: ASCL, composite sparse contrastive loss.
    """
    a, b = pairs.hardest / temperature, pairs.easiest / temperature
    log_sigma = math.log(2.0) + a + b - torch.logaddexp(a, b)
    return _softplus((pairs.negatives / temperature).logsumexp(1) - log_sigma)


def weighted_contrast(pairs: SparsePairs, temperature: float) -> Tensor:
    """WSCL of each cluster, (C,): w log(1 + Z / e^a), the weight w = e^a / (e^a + e^b) with its gradient.

    Only the hardest pair is the positive; it counts the less, the farther the easiest pair is from it.

    Source: ASCL, weighted sparse contrastive loss.
    """
    a, b = pairs.hardest / temperature, pairs.easiest / temperature
    return torch.sigmoid(a - b) * _softplus((pairs.negatives / temperature).logsumexp(1) - a)


@LOSS_REGISTRY.register()
class SparseContrastiveLoss(nn.Module):
    """Mean over the clusters of the batch of `composite` * CSCL + `weighted` * WSCL, over the batch of all processes.

    Clusters whose number of images in the batch differs from that of the others count nowhere, see `full_groups`.
    Fewer than two clusters are left: zero, with zero gradient.

    Args:
        temperature: similarities are divided by it, > 0.
        composite: weight of CSCL, from 0.
        weighted: weight of WSCL, from 0.

    Raises:
        ValueError: a parameter out of range.

    Source: ASCL, official code, whose sum of the two is divided by 4.
    """

    def __init__(self, *, temperature: float = 0.05, composite: float = 0.25, weighted: float = 0.25) -> None:
        super().__init__()
        if temperature <= 0:
            raise InvalidValue(f"SparseContrastiveLoss: TEMPERATURE is {temperature}; a number above 0 is accepted.")
        for key, value in (("COMPOSITE", composite), ("WEIGHTED", weighted)):
            if value < 0:
                raise InvalidValue(f"SparseContrastiveLoss: {key} is {value}; a weight from 0 is accepted. Change it.")
        self.temperature = temperature
        self.composite = composite
        self.weighted = weighted

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        """Scalar; feats (B,D) unit length, labels (B,)."""
        feats = comm.all_gather_with_gradient(at_least_float32(feats))
        groups = full_groups(comm.all_gather(labels, equal=True))
        if len(groups) < 2:
            return feats.sum() * 0.0
        with torch.autocast(feats.device.type, enabled=False):
            pairs = sparse_pairs(feats, groups.to(feats.device, non_blocking=True))
            composite = composite_contrast(pairs, self.temperature).mean()
            weighted = weighted_contrast(pairs, self.temperature).mean()
        return self.composite * composite + self.weighted * weighted


def _softplus(value: Tensor) -> Tensor:
    """log(1 + e^value); from 50 on `value` itself, which float64 cannot tell from it."""
    return F.softplus(value, threshold=50)
