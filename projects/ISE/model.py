"""Cluster contrast in which each image brings a support sample, and both face and move the memory."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import similarity
from fastreid_uns.modeling.memory import ClusterMemory
from fastreid_uns.modeling.meta_arch import Baseline
from fastreid_uns.registry import META_ARCH_REGISTRY


def support_degree(progress: float, highest: float = 0.25) -> float:
    """How far a support sample is from its image: 0 when a run begins, `highest` when it ends, fast at first.

    Args:
        progress: share of the run that is done, from 0 to 1.
        highest: the degree at the end.

    Source: Zhang et al. 2022 (ISE), progressive linear interpolation: highest ln((e - 1) progress + 1).
    """
    return highest * math.log((math.e - 1.0) * progress + 1.0)


def nearest_foreign(feats: Tensor, rows: Tensor, centroids: Tensor) -> Tensor:
    """(B,) for each image the row of the most similar centroid but its own; its own where there is no other.

    Args:
        feats: (B,D) unit length.
        rows: (B,) row of the own centroid.
        centroids: (K,D).
    """
    cosine = similarity(feats.detach(), centroids)
    cosine = cosine.scatter(1, rows[:, None], -torch.inf)
    nearest = cosine.argmax(1)
    return torch.where(cosine.amax(1) > -torch.inf, nearest, rows)


def support_samples(feats: Tensor, rows: Tensor, centroids: Tensor, degree: float) -> Tensor:
    """(B,D) of unit length: each image, moved by `degree` along the way from its own to the nearest foreign centroid.

    The gradient flows through the images and the normalisation; centroids are constants.

    Args:
        feats: (B,D) unit length.
        rows: (B,) row of the own centroid.
        centroids: (K,D).
        degree: share of the way, from 0.

    Source: Zhang et al. 2022 (ISE), eq. of the support sample.
    """
    centroids = centroids.to(feats.dtype)
    way = centroids[nearest_foreign(feats, rows, centroids)] - centroids[rows]
    return F.normalize(feats + degree * way)


@META_ARCH_REGISTRY.register()
class ISEModel(Baseline):
    """`Baseline` with a support sample for each image, whose label is that of the image.

    Beside what `Baseline` offers, losses are offered `supports` (B,D) and `support_logits` (B,rows). The memory sees
    images and supports before either has moved it, and is then moved by both: in one move for each cluster if it is
    `hard`, else by the images and then by the supports.

    Args:
        degree: of the supports at the end of the run, see `support_degree`, in [0, 1].
        keys: those of `Baseline`.

    Raises:
        ValueError: a degree out of range, or a memory that is no `ClusterMemory`.

    Source: Zhang et al. 2022 (ISE), implicit sample extension.
    """

    memory: ClusterMemory

    def __init__(self, *parts: Any, degree: float = 0.25, **keys: Any) -> None:
        super().__init__(*parts, **keys)
        if not 0 <= degree <= 1:
            raise InvalidValue(f"ISEModel: MODEL.DEGREE is {degree}; 0 to 1 is accepted, the paper's code has 0.25.")
        if not isinstance(self.memory, ClusterMemory):
            found = "none" if self.memory is None else type(self.memory).__name__
            raise InvalidValue(
                f"MODEL.MEMORY.NAME: ISEModel got {found}; supports are on the way between centroids. Set it to "
                f"ClusterMemory."
            )
        self.degree = degree

    def contrast(self, feats: Tensor, rows: Tensor, most: int | None) -> dict[str, Tensor]:
        """`logits` of the images, `supports` and `support_logits`; in training the memory moves."""
        degree = support_degree(self.moment.progress, self.degree)
        with torch.autocast(feats.device.type, enabled=False):
            supports = support_samples(feats, rows, self.memory.features, degree)
        logits = self.memory(torch.cat([feats, supports]), rows.repeat(2), None if most is None else 2 * most)
        own, theirs = logits.chunk(2)
        return {"logits": own, "supports": supports, "support_logits": theirs}
