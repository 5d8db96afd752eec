"""Nearest neighbours in blocks, exactly; no step holds an N x N matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.pseudo_labels.search.candidates import search_by_candidates
from fastreid_uns.pseudo_labels.search.gpu import farthest_by_rows, search_by_rows
from fastreid_uns.utils import sharing
from fastreid_uns.utils.precision import full_precision


@torch.no_grad()
def nearest_neighbours(feats: Tensor, k: int, *, block: int = 2048) -> tuple[Tensor, Tensor]:
    """The k nearest images of each image by squared Euclidean distance, exactly, the image itself first.

    Args:
        feats: (N, D) float, finite; taken as float32 on the device that it is on.
        k: neighbours of each image, itself included, 1..N.
        block: rows of a block of products at most, and of its columns on a CPU; it does not show in the result.

    Returns:
        Squared distances (N, k) float32, ascending from the image's own 0, and their images (N, k) int64; where
        distances are equal, the lower index comes first. A distance is summed in float64 and rounded once.

    Raises:
        ValueError: NaN or infinite rows, no rows, or k outside 1..N.
    """
    return _search(feats, k, block)[:2]


@torch.no_grad()
def neighbours_and_farthest(feats: Tensor, k: int, *, block: int = 2048) -> tuple[Tensor, Tensor, Tensor]:
    """`nearest_neighbours`, and (N,) float32 squared distance of each image to the one farthest from it.

    The farthest is that of a float32 product, which may be off by rounding (about 1e-6).
    """
    return _search(feats, k, block, farthest=True)


@torch.no_grad()
def nearest_of_others(feats: Tensor, groups: Tensor, k: int, *, block: int = 2048) -> tuple[Tensor, Tensor]:
    """The k nearest images of other groups for each image, exactly, with ties as in `nearest_neighbours`.

    Args:
        feats: (N, D) float, finite.
        groups: (N,) int, such as the camera of each image.
        k: neighbours of each image, 1..N.

    Returns:
        Squared distances (N, k) float32, ascending, and images (N, k) int64; where the other groups have fewer than k
        images, inf and -1 at the end.

    Raises:
        ValueError: as `nearest_neighbours`, or another number of groups than of images.
    """
    feats = checked(feats, k)
    if len(groups) != len(feats):
        raise InvalidValue(
            f"nearest_of_others: {len(groups):,} groups for {len(feats):,} images; each needs one. Pass them all."
        )
    with full_precision(feats.device):
        if feats.device.type == "cpu":
            sq, index, _ = search_by_candidates(feats, k, block, groups=groups.cpu().numpy())
        else:
            sq, index = _by_rows(feats, k, block, groups.to(feats.device))
    return sq, torch.where(sq.isinf(), -1, index)


@torch.no_grad()
def nearest_among(queries: Tensor, candidates: Tensor, k: int, *, block: int = 2048) -> tuple[Tensor, Tensor]:
    """The k nearest of other images for each query, exactly, with ties as in `nearest_neighbours`.

    Args:
        queries: (Q, D) float, finite.
        candidates: (C, D) float, finite, on the same device.
        k: 1..C.

    Returns:
        Squared distances (Q, k) float32, ascending, and places among the candidates (Q, k) int64.

    Raises:
        ValueError: NaN or infinite rows, no rows, or k out of range.
    """
    if not 1 <= k <= len(candidates):
        raise InvalidValue(f"nearest_among: k is {k}; it must lie in 1..{len(candidates):,}, the candidates.")
    groups = torch.arange(len(queries) + len(candidates)) >= len(queries)
    sq, index = nearest_of_others(torch.cat([queries, candidates]), groups.long(), k, block=block)
    return sq[: len(queries)], index[: len(queries)] - len(queries)


def _search(feats: Tensor, k: int, block: int, *, farthest: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    feats = checked(feats, k)
    with full_precision(feats.device):
        if feats.device.type == "cpu":
            return search_by_candidates(feats, k, block, farthest=farthest)
        far = farthest_by_rows(feats, block) if farthest else feats.new_zeros(0)
        return *_by_rows(feats, k, block), far


def _by_rows(feats: Tensor, k: int, block: int, groups: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`search_by_rows` of all images, each process those of its own."""
    sq, index = search_by_rows(feats, k, block, groups, rows=sharing.own_rows(len(feats)))
    if sharing.ranks() > 1:
        sq, index = (torch.cat(sharing.from_all(part.cpu())).to(feats.device) for part in (sq, index))
    return sq, index


def checked(feats: Tensor, k: int) -> Tensor:
    """The features as float32 in one piece, if they can be searched.

    Raises:
        ValueError: as `nearest_neighbours`.
    """
    if not 1 <= k <= len(feats):
        raise InvalidValue(f"nearest_neighbours: k is {k}; it must lie in 1..{len(feats):,}, the number of images.")
    check_finite(feats)
    return feats.detach().float().contiguous()


def check_finite(feats: Tensor) -> None:
    """Refuse NaN and infinity, also of squared lengths in float32.

    Raises:
        ValueError: names how many rows are broken, and the first of them.
    """
    own = sharing.own_rows(len(feats))
    lengths = torch.linalg.vector_norm(feats[own.start : own.stop], dim=1, dtype=torch.float32)
    finite = lengths.square().isfinite()
    broken = (~torch.cat(sharing.from_all(finite.cpu()))).nonzero().flatten()
    if len(broken):
        raise InvalidValue(
            f"features: {len(broken):,} of {len(feats):,} rows hold NaN or infinity, the first is row "
            f"{int(broken[0]):,}; all must be finite, and their squares too. Look for a diverged loss or a bad image."
        )
