"""What the parts hand to each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from fastreid_uns.errors import InvalidValue
from fastreid_uns.utils.transfer import to_device

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, device

PROTOCOLS = ("cross_camera", "plain", "one_per_identity")


class NoClusters(InvalidValue):
    """A clustering left every image an outlier."""


class Record(NamedTuple):
    """One image of a data set.

    `identity` -1 is junk in a test split and "unknown" in a training split; `camera` -1 is unknown.
    """

    path: str
    identity: int
    camera: int


class ReIDData(NamedTuple):
    """A data set: lists of images and the protocol by which it is scored (one of `PROTOCOLS`)."""

    train: list[Record]
    query: list[Record]
    gallery: list[Record]
    protocol: str


class Batch(NamedTuple):
    """One training batch of B images.

    `index` counts the unlabelled training images 0..N-1 and then the labelled source images N..N+S-1, the same in
    every epoch. `labels` number the source classes first and the clusters after them, so that they are rows of a
    memory that holds source rows before target rows; without source sets they are the clusters 0..K-1.
    """

    views: tuple[Tensor, ...]  # each (B,3,H,W) float32 in 0..1
    index: Tensor  # type: ignore[assignment]  # (B,) int64
    labels: Tensor  # (B,) int64
    cameras: Tensor  # (B,) int64, -1 unknown
    domains: Tensor  # (B,) int64 on the CPU, 0 = the unlabelled set, 1.. = labelled source sets
    most: int | None = None  # images of one label among the rows of all processes, at most; None = not known

    def rows(self, index: slice | Tensor) -> Batch:
        """Some rows of the batch.

        Args:
            index: a slice, or (R,) int64 positions on the CPU. Positions may repeat, so `most` is not known after them.
        """
        most = self.most if isinstance(index, slice) else None
        own = index if isinstance(index, slice) else to_device(index, self.index.device)
        return Batch(
            views=tuple(view[own] for view in self.views),
            index=self.index[own],
            labels=self.labels[own],
            cameras=self.cameras[own],
            domains=self.domains[index],
            most=most,
        )

    def to(self, device: device) -> Batch:
        """The batch on a device, all but `domains`, which the host reads; the host does not wait."""
        return self._replace(
            views=tuple(to_device(view, device) for view in self.views),
            index=to_device(self.index, device),
            labels=to_device(self.labels, device),
            cameras=to_device(self.cameras, device),
        )


class Moment(NamedTuple):
    """Where in a run the model is, as the trainer tells it."""

    epoch: int = 0  # from 0
    step: int = 0  # optimiser steps of the run that are done
    progress: float = 0.0  # share of the steps of the run that are done, from 0 to below 1


class HeadOutput(NamedTuple):
    """What a head gives for B images."""

    pooled: Tensor  # (B,C) before the neck
    feats: Tensor  # (B,D) unit length, float32
    parts: Tensor | None = None  # (B,P,D) unit length, float32
    unnormalized: Tensor | None = None  # (B,D) after the neck, before unit length
    unnormalized_parts: Tensor | None = None  # (B,P,D)


class PairAnswers(Protocol):
    """What people have answered about pairs of the N images; `pseudo_labels.constraints.Constraints` is the one."""

    def apart(self) -> np.ndarray:
        """(P, 2) int64, all pairs of images that must stay apart, each in both orders."""

    def apply(self, labels: Tensor, feats: Tensor) -> Tensor:
        """(N,) labels that keep to the answers, made from those of any clustering; `feats` (N, D) unit length."""


@dataclass
class FeatureBank:
    """What a pseudo-label generator may see of the N unlabelled training images: no path, no identity.

    Domain adaptation adds the S images of the labelled source sets, whose classes are known by right.
    """

    feats: Tensor  # (N,D) unit length, float32, CPU or device
    cameras: Tensor  # (N,) int64, -1 unknown
    extras: dict[str, Tensor] = field(default_factory=dict)  # further outputs of extract(), (N, ...)
    source_feats: Tensor | None = None  # (S,D) unit length, float32
    source_labels: Tensor | None = None  # (S,) int64, classes 0..C-1
    constraints: PairAnswers | None = None


@dataclass
class PseudoLabels:
    """The result of one clustering.

    Raises:
        NoClusters: every image is an outlier.
        ValueError: gaps in the numbering, or row counts that disagree.

    Example:
        >>> import torch
        >>> pseudo = PseudoLabels(labels=torch.tensor([1, 0, -1, 1]), centroids=torch.eye(2))
        >>> pseudo.num_clusters, pseudo.sizes.tolist()
        (2, [1, 2])
    """

    labels: Tensor  # (N,) int64, -1 = not in any cluster
    centroids: Tensor  # (K,D) unit length
    extras: dict[str, Tensor] = field(default_factory=dict)  # per image, (N, ...)

    def __post_init__(self) -> None:
        clusters = self.labels[self.labels >= 0].unique()
        if len(clusters) == 0:
            raise NoClusters(
                f"PSEUDO_LABELS: every one of {len(self.labels):,} images is an outlier; at least one cluster is "
                f"needed. Raise PSEUDO_LABELS.EPS or lower MIN_SAMPLES."
            )
        if int(clusters[-1]) + 1 != len(clusters):
            raise InvalidValue(
                f"PSEUDO_LABELS: labels run to {int(clusters[-1])} but {len(clusters)} clusters exist; labels must "
                f"run 0..K-1 without a gap. Renumber them, for example with torch.unique(..., return_inverse=True)."
            )
        if len(self.centroids) != len(clusters):
            raise InvalidValue(
                f"PSEUDO_LABELS: {len(self.centroids)} centroids for {len(clusters)} clusters; there must be one for "
                f"each. Compute them with pseudo_labels.base.centroids(feats, labels)."
            )
        for name, value in self.extras.items():
            if len(value) != len(self.labels):
                raise InvalidValue(
                    f"PSEUDO_LABELS: extras[{name!r}] has {len(value)} rows for {len(self.labels)} images; extras "
                    f"hold one row for each image. Index them by image."
                )

    @property
    def num_clusters(self) -> int:
        """K."""
        return len(self.centroids)

    @property
    def sizes(self) -> Tensor:
        """(K,) images in each cluster."""
        return self.labels[self.labels >= 0].bincount(minlength=self.num_clusters)

    def to(self, device: device | str) -> PseudoLabels:
        """The same labels on another device; not checked again."""
        moved = object.__new__(PseudoLabels)
        moved.labels = self.labels.to(device)
        moved.centroids = self.centroids.to(device)
        moved.extras = {name: value.to(device) for name, value in self.extras.items()}
        return moved
