"""The way from photos to groups: views, pooled features, whitening, training, average linkage."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.whitening import MainDirections
from fastreid_uns.photos.adapt import Adaptation, adapt
from fastreid_uns.photos.embed import (
    Stages,
    cache_activations,
    direct_features,
    pooled_features,
    whitened,
    whitened_along,
    whitening_of,
)
from fastreid_uns.photos.local import LocalMatch, local_descriptors, local_match
from fastreid_uns.photos.view_store import ViewStore
from fastreid_uns.pseudo_labels.base import centroids
from fastreid_uns.pseudo_labels.constraints import Constraints
from fastreid_uns.pseudo_labels.linkage import Dendrogram, average_linkage, multi_scale_distance, reach_of
from fastreid_uns.utils.allocator import raise_malloc_thresholds
from fastreid_uns.utils.precision import full_precision

logger = logging.getLogger(__name__)

_TRAINED_VIEW = 1.4  # work of a view that the top is trained on, with that of a view through the whole network as 1
_TOP_VIEW = 0.3  # work of a view through the top

Told = Callable[[str, float, "float | None"], None]  # stage, share of the work that is done, seconds left


def _silent(stage: str, share: float, left: float | None) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class Settings:
    """How photos are grouped; the same for all sets, chosen on the training identities of three.

    Attributes:
        views: of each photo, itself included.
        adaptation: the training; `steps` 0 trains nothing.
        threshold: average distance up to which groups are merged.
        positives: the same for the smaller groups to which the whitening is fitted, and whose photos are each other's
            positives in training.
        k1, k2, cosine: of `multi_scale_distance`; see `for_count`.
        amp: precision of what is not being trained: `auto` takes bfloat16 where the processor is faster in it, so that
            groups may differ a little between processors; `none` float32.
        seed: of views and training.
    """

    views: int = 4
    adaptation: Adaptation = field(default_factory=Adaptation)
    threshold: float = 0.82
    positives: float = 0.7
    k1: tuple[int, ...] = (12, 25, 50)
    k2: int = 6
    cosine: float = 0.5
    amp: str = "auto"
    seed: int = 0


def for_count(settings: Settings, count: int) -> Settings:
    """Settings for so many photos: of few photos fewer neighbours vote, or all of them would be neighbours."""
    share = min(1.0, count**0.5 / 25)
    return replace(settings, k1=tuple(max(round(k * share), 3) for k in settings.k1))


class Features(NamedTuple):
    """Features of N photos, float32 on the CPU."""

    feats: Tensor  # (N, D), unit length
    views: Tensor  # (N, V, D) before the whitening, along the main directions; for `identify.least_known`
    local: LocalMatch | None = None  # where it tells more than features alone; only after training


class Grouping(NamedTuple):
    """Groups of N photos, and how sure each place in them is."""

    labels: np.ndarray  # (N,) int64 groups 0..K-1, by their first photos; a photo alone has a group of its own
    confidence: np.ndarray  # (N,) float64 in 0..1 that the photo belongs to its group; not calibrated
    nearest: np.ndarray  # (N,) int64 nearest other group, -1 if there is none
    similarity: np.ndarray  # (N,) float64 cosine to the centroid of that group, 0 if there is none
    feats: Tensor  # (N, D) float32, unit length
    dendrogram: Dendrogram

    @property
    def individuals(self) -> float:
        """Effective number of groups of at least two photos: as many pairs would share one of so many equal ones."""
        sizes = np.bincount(self.labels)
        sizes = sizes[sizes > 1].astype(float)
        return float(sizes.sum() ** 2 / (sizes**2).sum()) if len(sizes) else 0.0


class Clock:
    """Tells how far a run is and how long it will still take.

    Args:
        work: of the whole run, in any unit.
        told: gets the stage, the share of the work that is done (0..1) and the seconds left, None at the beginning.
    """

    def __init__(self, work: float, told: Told) -> None:
        self.work, self.told = max(work, 1e-9), told
        self.done, self.begin, self.stage = 0.0, time.monotonic(), ""

    def add(self, done: float) -> None:
        """Count work that was done."""
        self.done = min(self.done + done, self.work)
        passed = time.monotonic() - self.begin
        left = passed * (self.work - self.done) / self.done if self.done > 0 else None
        self.told(self.stage, self.done / self.work, left)


def embed(
    images: ImageSet,
    encoder: Encoder,
    settings: Settings,
    *,
    constraints: Constraints | None = None,
    kept: ViewStore | None = None,
    told: Told = _silent,
) -> Features:
    """Features of photos; the encoder is trained and its whitening fitted on the way, in place.

    Args:
        images: at least one photo.
        encoder: with a `PooledHead` that whitens, its weights as they were published; its device computes.
        constraints: used in training, and in the whitening of what was trained.
        kept: what the network gives for the views goes there; what is there already is not computed again.
        told: see `Clock`.
    """
    device = encoder.mean.device
    if device.type == "cpu":
        raise_malloc_thresholds(large=False)
    with full_precision(device):
        return _embed(images, encoder, settings, constraints, ViewStore() if kept is None else kept, told)


def _embed(
    images: ImageSet,
    encoder: Encoder,
    settings: Settings,
    constraints: Constraints | None,
    kept: ViewStore,
    told: Told,
) -> Features:
    how, number, count = settings.adaptation, settings.views, len(images)
    training = how.steps > 0 and count > 1
    stages = Stages.of(encoder, images.size, trained=training, amp=settings.amp)
    trained = 2 * how.steps * min(how.batch, count) * _TRAINED_VIEW if training else 0
    left = count - kept.done
    clock = Clock(left * number + (2 * count * number * _TOP_VIEW if training else 0) + trained, told)
    clock.stage = "read photos"
    if not training:
        pooled = direct_features(stages, images, number, settings.seed, kept, clock.add)
        found = main_directions(stages, pooled)
        kept.release()
        return fitted(stages, found, settings)
    kept = cache_activations(stages, images, number, settings.seed, kept, clock.add)
    pooled = pooled_features(stages, kept, lambda views: clock.add(views * _TOP_VIEW))
    feats = fitted(stages, main_directions(stages, pooled), settings, constraints).feats
    del pooled
    local, positives = local_and_positives(kept, feats, settings, constraints)
    clock.stage = "train"
    losses = adapt(
        stages,
        kept,
        whitening_of(stages.head),
        how,
        positives,
        seed=settings.seed,
        told=lambda views: clock.add(views * _TRAINED_VIEW),
    )
    logger.info("trained %d steps: loss %.2f to %.2f", len(losses), losses[0], losses[-1])
    clock.stage = "features"
    pooled = pooled_features(stages, kept, lambda views: clock.add(views * _TOP_VIEW))
    return fitted(stages, main_directions(stages, pooled), settings, constraints, local)


def main_directions(stages: Stages, pooled: Tensor) -> MainDirections:
    """As many directions as the whitening has numbers.

    Args:
        pooled: (N, V, P), see `embed.pooled_features`.
    """
    return MainDirections.of(pooled, whitening_of(stages.head).dim)


def fitted(
    stages: Stages,
    found: MainDirections,
    settings: Settings,
    constraints: Constraints | None = None,
    local: LocalMatch | None = None,
) -> Features:
    """Features of photos by a whitening that is fitted to them: to their views, then to the groups that come out too.

    Args:
        found: of the N photos.
    """
    whitening, views = whitening_of(stages.head), found.views.cpu()
    if len(views) == 1:  # has nothing to be fitted to
        return Features(whitened(stages.head, found.mean.float().view(1, 1, -1)).cpu(), views, local)
    whitening.fit(found)
    groups = positive_groups(whitened_along(stages.head, found).cpu(), settings, constraints, local)
    whitening.fit(found, groups)
    return Features(whitened_along(stages.head, found).cpu(), views, local)


def local_and_positives(
    kept: ViewStore, feats: Tensor, settings: Settings, constraints: Constraints | None = None
) -> tuple[LocalMatch | None, Tensor]:
    """Local descriptors where they tell more than features alone, and `positive_groups` with them.

    Args:
        kept: activations of N photos.
        feats: (N, D) features of these.
    """
    groups = positive_groups(feats, settings, constraints)
    local = local_match(local_descriptors(kept), feats, groups, reach_of(settings.k1))
    return local, groups if local is None else positive_groups(feats, settings, constraints, local)


def positive_groups(
    feats: Tensor, settings: Settings, constraints: Constraints | None = None, local: LocalMatch | None = None
) -> Tensor:
    """(N,) int64 groups that hold few photos of other individuals, but not all of their own."""
    strict = replace(settings, threshold=settings.positives)
    return torch.from_numpy(cluster(feats, strict, constraints, local).labels)


def cluster(
    feats: Tensor, settings: Settings, constraints: Constraints | None = None, local: LocalMatch | None = None
) -> Grouping:
    """Groups of photos by their features.

    Args:
        feats: (N, D) float32, unit length, N at least 1.
        constraints: answers that the groups keep to.
        local: counts beside the features.
    """
    from scipy.sparse import csr_matrix

    count = len(feats)
    distance = (
        multi_scale_distance(feats, settings.k1, settings.k2, cosine=settings.cosine, similarity=local)
        if count > 1
        else csr_matrix((1, 1), dtype=np.float32)
    )
    dendrogram = average_linkage(distance, constraints)
    labels = dendrogram.cut(settings.threshold)
    if constraints is not None:
        labels = constraints.apply(torch.from_numpy(labels), feats).numpy()
    nearest, similarity = _nearest_others(feats, labels)
    return Grouping(labels, _confidence(distance, labels), nearest, similarity, feats, dendrogram)


def _nearest_others(feats: Tensor, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    means = centroids(feats, torch.from_numpy(labels))
    if len(means) < 2:
        return np.full(len(labels), -1, np.int64), np.zeros(len(labels))
    best = []
    for rows, own in zip(feats.split(4096), torch.from_numpy(labels).split(4096), strict=True):
        similarity = rows @ means.T
        best.append(similarity.scatter_(1, own[:, None], -torch.inf).max(1))
    nearest = torch.cat([found.indices for found in best]).numpy()
    return nearest, torch.cat([found.values for found in best]).double().numpy()


def _confidence(distance, labels: np.ndarray) -> np.ndarray:
    """Share of the own group in what a photo has in common with it and with the nearest other one, on average.

    A photo alone has 1 less what it has in common with another group on average.
    """
    from scipy.sparse import csr_matrix

    count = len(labels)
    sizes = np.bincount(labels)
    shared = distance.copy()
    shared.data = 1 - shared.data
    shared.setdiag(0)
    member = csr_matrix((np.ones(count, np.float32), (np.arange(count), labels)), shape=(count, len(sizes)))
    total = (shared @ member).tocoo()
    mine = labels[total.row] == total.col
    mean = total.data / np.maximum(sizes[total.col] - mine, 1)
    own, other = np.zeros(count), np.zeros(count)
    own[total.row[mine]] = mean[mine]
    np.maximum.at(other, total.row[~mine], mean[~mine])
    alone = sizes[labels] == 1
    with np.errstate(invalid="ignore"):
        share = np.where(own + other > 0, own / (own + other), 0.0)
    return np.where(alone, 1 - other, share)


def group(
    images: ImageSet,
    encoder: Encoder,
    settings: Settings,
    *,
    constraints: Constraints | None = None,
    told: Told = _silent,
) -> Grouping:
    """`embed` and `cluster`: from any number of photos, at least one, to groups."""
    found = embed(images, encoder, settings, constraints=constraints, told=told)
    return cluster(found.feats, settings, constraints, found.local)


def features(images: ImageSet, encoder: Encoder, settings: Settings) -> Tensor:
    """(M, D) features of further photos, by an encoder that `group` has trained and whose whitening it has fitted.

    The device of the encoder computes; the features are on the CPU.
    """
    with full_precision(encoder.mean.device):
        stages = Stages.of(encoder, images.size, trained=False, amp=settings.amp)
        return whitened(stages.head, direct_features(stages, images, settings.views, settings.seed)).cpu()
