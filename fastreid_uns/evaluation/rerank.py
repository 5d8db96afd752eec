"""Query-gallery distances re-ranked by k-reciprocal neighbours, a few queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.evaluation.retrieval import block_rows
from fastreid_uns.pseudo_labels.jaccard import camera_encoding, encode, encoding_distance
from fastreid_uns.pseudo_labels.search.exact import neighbours_and_farthest
from fastreid_uns.utils.precision import full_precision

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix


@torch.no_grad()
def rerank_blocks(
    query: Tensor, gallery: Tensor, *, k1: int = 20, k2: int = 6, weight: float = 0.3, rows: int | None = None
) -> Iterator[Tensor]:
    """Re-ranked distances, blocks of queries in order.

    Args:
        query: (Q, D) float, unit length.
        gallery: (G, D) float, unit length, same device.
        k1: neighbours that vote, the image itself **not** included, as in the paper and unlike in clustering (>= 1);
            at most all images of query and gallery.
        k2: neighbours over which the encoding is averaged, the image itself included; 1 switches it off.
        weight: of the original distance, 0..1; the Jaccard distance has the rest.
        rows: queries in a block; None = as many as make 16 MiB.

    Yields:
        (b, G) float32 in 0..1 on the device of the features.

    Raises:
        ValueError: NaN or infinite rows, or a parameter out of range.

    Source: Zhong et al. 2017, eq. 12, with the authors' choice of original distance: the square of the squared
    Euclidean one, divided by its largest value for the image among all of query and gallery.
    Memory: O((Q + G) * k1) beside one block. Time: one k-NN search over query and gallery together.
    """
    if k1 < 1 or k2 < 1 or not 0 <= weight <= 1:
        raise InvalidValue(
            f"rerank: k1 is {k1}, k2 is {k2} and weight is {weight}; k1 and k2 must be at least 1 and weight 0..1."
        )
    if not len(query) or not len(gallery):
        raise InvalidValue(f"rerank: {len(query)} query and {len(gallery)} gallery images; there must be some of both.")
    joint = torch.cat([query, gallery])
    sq, index, farthest = neighbours_and_farthest(joint, min(k1 + 1, len(joint)))
    farthest.clamp_(min=torch.finfo(torch.float32).tiny)
    scale = farthest.cpu().numpy()
    encoding = encode(joint, sq, index, k1, k2, lambda images, distances: (distances / scale[images]) ** 2)
    yield from _blended(query, gallery, encoding, farthest, weight, rows)


@torch.no_grad()
def camera_rerank_blocks(
    query: Tensor,
    gallery: Tensor,
    cameras: Tensor,
    *,
    k1_intra: int = 5,
    k1_inter: int = 20,
    k2_intra: int = 3,
    k2_inter: int = 3,
    weight: float = 0.3,
    rows: int | None = None,
) -> Iterator[Tensor]:
    """Re-ranked distances whose neighbours are searched in the own camera and in all others apart.

    Args:
        query, gallery, weight, rows: see `rerank_blocks`.
        cameras: (Q + G,) int, of the queries and then of the gallery.
        k1_intra, k1_inter, k2_intra, k2_inter: see `jaccard.camera_jaccard_distance`.

    Yields, Raises: as `rerank_blocks`; also if all images are of one camera.

    Source: Chen et al. 2024 (CA-Jaccard), official code; differs: lists of a small camera are not filled.
    """
    joint = torch.cat([query, gallery])
    farthest = neighbours_and_farthest(joint, 1)[2].clamp_(min=torch.finfo(torch.float32).tiny)
    keys = (k1_intra, k1_inter, k2_intra, k2_inter)
    encoding = camera_encoding(joint, cameras, *keys, scale=farthest.cpu().numpy())
    yield from _blended(query, gallery, encoding, farthest, weight, rows)


def _blended(
    query: Tensor, gallery: Tensor, encoding: csr_matrix, farthest: Tensor, weight: float, rows: int | None
) -> Iterator[Tensor]:
    """Blocks of (1 - weight) * Jaccard distance + weight * original distance."""
    lists = encoding[len(query) :].T.tocsr()
    norms = gallery.float().square().sum(1)
    start = 0
    for part in query.float().split(rows or block_rows(len(gallery))):
        stop = start + len(part)
        jaccard = encoding_distance(encoding[start:stop], lists)
        with full_precision(part.device):
            distances = (part.square().sum(1, True) + norms).addmm_(part, gallery.float().T, alpha=-2).clamp_(min=0)
        distances.div_(farthest[start:stop, None]).square_().mul_(weight).add_(1 - weight)
        row = np.repeat(np.arange(len(part)), np.diff(jaccard.indptr))
        at = torch.from_numpy(row * len(gallery) + jaccard.indices).to(part.device)
        gain = torch.from_numpy((1 - weight) * (1 - jaccard.data)).to(part.device)
        distances.view(-1)[at] -= gain
        yield distances
        start = stop


def rerank(query: Tensor, gallery: Tensor, *, k1: int = 20, k2: int = 6, weight: float = 0.3) -> Tensor:
    """All re-ranked distances at once, (Q, G) float32; see `rerank_blocks`, which needs less memory."""
    return torch.cat(list(rerank_blocks(query, gallery, k1=k1, k2=k2, weight=weight)))


def camera_rerank(query: Tensor, gallery: Tensor, cameras: Tensor, **keys: float) -> Tensor:
    """All distances of `camera_rerank_blocks` at once, (Q, G) float32."""
    return torch.cat(list(camera_rerank_blocks(query, gallery, cameras, **keys)))  # type: ignore[arg-type]
