"""What a query pays: for its centroid among all, and for its partner."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ("forward", "reverse", "symmetric")


def similarities(feats: Tensor, rows: Tensor) -> Tensor:
    """(B,R) products of features (B,D) and rows (R,D), in float32 at least, under autocast too."""
    with torch.autocast(feats.device.type, enabled=False):
        dtype = torch.promote_types(feats.dtype, rows.dtype)
        return feats.to(dtype) @ rows.to(dtype).T


def class_loss(products: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """(B,) -log softmax_y(q . c / temperature); products (B,K), labels (B,).

    Source: ACFL, eq. 6; on the products of hard centroids the first term of eq. 5.
    """
    return F.cross_entropy(products / temperature, labels, reduction="none")


def cluster_distribution(products: Tensor, temperature: float) -> Tensor:
    """(B,K) log of v(q), the softmax of the products with all easy centroids."""
    return (products / temperature).log_softmax(1)


def divergence(first: Tensor, second: Tensor, direction: str = "forward") -> Tensor:
    """Relative entropy between the cluster distributions of two images, for each of B pairs; both get the gradient.

    Args:
        first: (B,K) log of v(q_i).
        second: (B,K) log of v(q_j).
        direction: `forward` = KL(v(q_i) || v(q_j)), `reverse` = KL(v(q_j) || v(q_i)), `symmetric` = their mean.

    Returns:
        (B,) >= 0.

    Source: ACFL, eq. 7.
    """
    gap = first - second
    if direction == "forward":
        return (first.exp() * gap).sum(1)
    if direction == "reverse":
        return -(second.exp() * gap).sum(1)
    return 0.5 * ((first.exp() - second.exp()) * gap).sum(1)


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """(B,) squared Euclidean distance of unit features (B,D), as 2 - 2 q_i . q_j.

    Source: ACFL, the loss "distance" of table 2.
    """
    return 2.0 - 2.0 * (first * second).sum(1)


@torch.no_grad()
def next_of_cluster(labels: Tensor, index: Tensor) -> Tensor:
    """The partner of each image of a batch: the next image of its cluster, around the end of the batch.

    A sampler draws the images of a cluster in random order, so this is a uniform choice among the others that it drew.
    Another image goes before another row of the same image (a batch may repeat one, with other augmentation), and that
    before the row itself, which is the last resort.

    Args:
        labels: (B,) cluster.
        index: (B,) image.

    Returns:
        (B,) rows of the batch.

    Source: ACFL, algorithm 1, line 9; differs: drawn inside the batch.
    """
    count = len(labels)
    row = torch.arange(count, device=labels.device)
    ahead = (row[None] - row[:, None]) % count
    cost = ahead + count * (index[:, None] == index[None]) + count * (ahead == 0)
    return cost.masked_fill(labels[:, None] != labels[None], 3 * count).argmin(1)


@torch.no_grad()
def least_similar(feats: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    """(B,) rows: the image of the own cluster in the batch that is least similar; the row itself if there is no other.

    Args:
        feats: (B,D) unit length.
        labels: (B,) cluster.
        index: (B,) image.
    """
    other = (labels[:, None] == labels[None]) & (index[:, None] != index[None])
    cost = similarities(feats, feats).masked_fill(~other, 3.0)
    cost.fill_diagonal_(2.0)
    return cost.argmin(1)
