"""Which images form a batch: a finite plan of each epoch, of which every process takes its slice."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastreid_uns.data.train_set import TrainSet
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.registry import SAMPLER_REGISTRY
from fastreid_uns.structures import PseudoLabels

logger = logging.getLogger(__name__)


class Sampler(ABC):
    """A batch sampler with a plan; a subclass says in `plan` how one is made.

    Args:
        length: batches in an epoch; 0 = as many as `one_pass` finds, anew in each epoch.
        seed: of the plans, from 0; global random state is neither read nor changed.
        rank: index of this process.
        world: number of processes.
        batch_size: images of one step over all processes.
        group: images that must not be parted by the slices of the processes, the `NUM_INSTANCES` of a cluster.

    Attributes:
        rows: (B,) int64, which rows of the global batch this process takes.

    Raises:
        ValueError: fewer than one instance, or the batch cannot be cut evenly.
    """

    def __init__(self, length: int, seed: int, rank: int, world: int, *, batch_size: int, group: int = 1) -> None:
        if group < 1:
            raise InvalidValue(f"DATALOADER.SAMPLER.NUM_INSTANCES is {group}; 1 or more is accepted. Raise it.")
        if batch_size < 1 or batch_size % (group * world):
            parts, numbers = ("NUM_INSTANCES x ", f"{group} x ") if group > 1 else ("", "")
            raise InvalidValue(
                f"DATALOADER.SAMPLER.BATCH_SIZE {batch_size} is no multiple of {parts}processes ({numbers}{world})."
            )
        self.length = length
        self.whole_passes = length == 0
        self.seed = seed
        self.batch_size = batch_size
        share = batch_size // world
        self.rows = torch.arange(rank * share, (rank + 1) * share)
        self._plan: np.ndarray | None = None

    @abstractmethod
    def plan(self, rng: np.random.Generator, pseudo: PseudoLabels, cameras: Tensor) -> np.ndarray:
        """Indices of the images of an epoch, int64 (length, batch_size), equal in every process.

        Args:
            rng: seeded by seed and epoch.
            pseudo: labels (N,) of this epoch, on the CPU; outliers (-1) must not be drawn.
            cameras: (N,) int64 on the CPU, -1 unknown.
        """

    def one_pass(self, pseudo: PseudoLabels) -> int:
        """Whole batches that the clustered images fill, at least one."""
        return max(1, int((pseudo.labels >= 0).sum()) // self.batch_size)

    def set_epoch(self, epoch: int, pseudo: PseudoLabels, cameras: Tensor) -> None:
        """Make the plan of an epoch.

        Raises:
            ValueError: as many cameras as labels are needed.
        """
        if len(pseudo.labels) != len(cameras):
            raise InvalidValue(
                f"sampler: {len(pseudo.labels):,} labels and {len(cameras):,} cameras; one of each is needed for each "
                f"image. Use -1 for unknown cameras."
            )
        if self.whole_passes:
            self.length = self.one_pass(pseudo)
        self._plan = self.plan(np.random.default_rng([self.seed, epoch]), pseudo.to("cpu"), cameras.cpu())

    def most_of_one(self, labels: Tensor) -> int:
        """How many images of one batch of the plan have the same label, at most; labels (N,) of all images."""
        rows = np.sort(labels.cpu().numpy()[self._planned()], axis=1)
        most = 1
        while (rows[:, most:] == rows[:, :-most]).any():
            most += 1
        return most

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        """The indices of this process, batch by batch.

        Raises:
            RuntimeError: no plan has been made.
        """
        for batch in self._planned():
            yield batch[self.rows.numpy()].tolist()

    def _planned(self) -> np.ndarray:
        if self._plan is None:
            raise InvalidState(f"{type(self).__name__}: there is no plan yet; call set_epoch after clustering.")
        return self._plan


@SAMPLER_REGISTRY.register()
class ClusterSampler(Sampler):
    """Batches of clusters, K images of each.

    One pass visits all clusters in random order. Of each it takes a random image, the anchor, and K - 1 others, from
    other cameras than the anchor's where there are any. A batch holds different clusters; those that do not fill the
    last batch of a pass are left out of it. Too few clusters for one batch are repeated, with a warning.

    Args:
        length, seed, rank, world: see `Sampler`.
        batch_size: images of one step over all processes.
        num_instances: K.
        camera_aware: prefer other cameras; an unknown camera (-1) of the anchor counts as no preference.
        short_groups: a cluster of one image gives one row instead of K copies; later groups move up.

    Source: Ge et al. 2020 (SpCL), official sampler; differs: K - 1 candidates suffice to draw without repeats (there
    K), and a cluster of one image gives K rows unless `short_groups`.

    Example:
        >>> pseudo = PseudoLabels(labels=torch.tensor([0, 0, 0, 1, 1, 1, -1]), centroids=torch.eye(2))
        >>> sampler = ClusterSampler(3, seed=1, rank=0, world=1, batch_size=4, num_instances=2)
        >>> sampler.set_epoch(0, pseudo, cameras=torch.full((7,), -1))
        >>> [pseudo.labels[batch].bincount().tolist() for batch in sampler]  # three batches, two images of each cluster
        [[2, 2], [2, 2], [2, 2]]
    """

    def __init__(
        self,
        length: int,
        seed: int,
        rank: int,
        world: int,
        *,
        batch_size: int = 256,
        num_instances: int = 16,
        camera_aware: bool = True,
        short_groups: bool = False,
    ) -> None:
        super().__init__(length, seed, rank, world, batch_size=batch_size, group=num_instances)
        self.num_instances = num_instances
        self.camera_aware = camera_aware
        self.short_groups = short_groups
        self._warned = False

    def plan(self, rng: np.random.Generator, pseudo: PseudoLabels, cameras: Tensor) -> np.ndarray:
        """See `Sampler.plan`. Time: one sort of N, and K^2 / 2 vector operations over the groups."""
        sizes = pseudo.sizes.numpy()
        one_pass = int(np.where((sizes == 1) & self.short_groups, 1, self.num_instances).sum())
        usable = _whole_batches(one_pass, self.batch_size)
        if one_pass < self.batch_size and not self._warned:
            logger.warning(
                "ClusterSampler: %d clusters give %d of the %d images of a batch, so it holds clusters more than once. "
                "Lower DATALOADER.SAMPLER.BATCH_SIZE to avoid this.",
                len(sizes),
                one_pass,
                self.batch_size,
            )
            self._warned = True
        clusters = _passes(rng, len(sizes), -(-self.length * self.batch_size // usable))
        groups = clusters.ravel()
        drawn = _Members(pseudo, cameras if self.camera_aware else None).draw(rng, groups, self.num_instances)
        if self.short_groups:
            keep = (sizes[groups] > 1)[:, None] | (np.arange(self.num_instances) == 0)
            drawn = drawn[keep]
        drawn = drawn.reshape(len(clusters), one_pass)[:, :usable].ravel()
        return drawn[: self.length * self.batch_size].reshape(self.length, self.batch_size)


@SAMPLER_REGISTRY.register()
class RandomSampler(Sampler):
    """Batches of random images, without repeats within a pass; a last batch that is not full is left out.

    Args:
        length, seed, rank, world: see `Sampler`.
        batch_size: images of one step over all processes.

    Example:
        >>> pseudo = PseudoLabels(labels=torch.tensor([0, 0, 1, 1, 1, 1, -1]), centroids=torch.eye(2))
        >>> sampler = RandomSampler(3, seed=1, rank=0, world=1, batch_size=2)
        >>> sampler.set_epoch(0, pseudo, cameras=torch.full((7,), -1))
        >>> sorted(image for batch in sampler for image in batch)  # one pass, without the outlier
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(self, length: int, seed: int, rank: int, world: int, *, batch_size: int = 256) -> None:
        super().__init__(length, seed, rank, world, batch_size=batch_size)

    def plan(self, rng: np.random.Generator, pseudo: PseudoLabels, cameras: Tensor) -> np.ndarray:
        """See `Sampler.plan`."""
        images = np.flatnonzero(pseudo.labels.numpy() >= 0)
        usable = _whole_batches(len(images), self.batch_size)
        order = _passes(rng, len(images), -(-self.length * self.batch_size // usable))[:, :usable].ravel()
        return images[order[: self.length * self.batch_size].reshape(self.length, self.batch_size)]


class JointSampler(Sampler):
    """Batches of labelled source images followed by unlabelled target images, each half drawn by a sampler of its own.

    The slice of a process is its share of each source, in order of the domains, then its share of the target. Indices
    count the N target images first: source image i of the S has index N + i.

    Args:
        target: draws from the clusters of the target.
        sources: one for each source set, drawing from its true classes; the batch sizes add up.
        train_set: domains, classes and cameras of all images.

    Raises:
        ValueError: the numbers of samplers and source sets, or of batches, disagree.
    """

    def __init__(self, target: Sampler, sources: Sequence[Sampler], train_set: TrainSet) -> None:
        domains = train_set.domains[train_set.num_images :].unique().tolist()
        if domains != list(range(1, len(sources) + 1)):
            raise InvalidValue(
                f"JointSampler: {len(sources)} source samplers for the domains {domains}; domains must count "
                f"1..{len(sources)}. Give one sampler for each source set."
            )
        lengths = [len(sampler) for sampler in (target, *sources)]
        if len(set(lengths)) > 1:
            raise InvalidValue(f"JointSampler: the samplers have {lengths} batches in an epoch; they must be equal.")
        self._parts = [*sources, target]
        self.length = len(target)
        self.whole_passes = target.whole_passes
        self.seed = target.seed
        self.batch_size = sum(part.batch_size for part in self._parts)
        first = np.cumsum([0, *(part.batch_size for part in self._parts)]).tolist()
        self.rows = torch.cat([part.rows + start for part, start in zip(self._parts, first[:-1], strict=True)])
        self._plan = None
        self._sources = []
        for domain in domains:
            members = (train_set.domains == domain).nonzero().flatten()
            classes, local = train_set.classes[members].unique(return_inverse=True)
            pseudo = PseudoLabels(local, torch.zeros(len(classes), 0))
            self._sources.append((members.numpy(), pseudo, train_set.cameras[members]))

    def one_pass(self, pseudo: PseudoLabels) -> int:
        """Those of the target; the sources give as many."""
        return self._parts[-1].one_pass(pseudo)

    def plan(self, rng: np.random.Generator, pseudo: PseudoLabels, cameras: Tensor) -> np.ndarray:
        """See `Sampler.plan`; the parts draw from streams of their own, derived from the seed of the target."""
        for part in self._parts:
            part.length = self.length
        streams = rng.spawn(len(self._parts))
        plans = []
        for part, stream, (members, classes, seen) in zip(self._parts, streams, self._sources, strict=False):
            plans.append(members[part.plan(stream, classes, seen)])
        plans.append(self._parts[-1].plan(streams[-1], pseudo, cameras))
        return np.concatenate(plans, axis=1)


class _Members:
    """The images of each cluster, side by side in the order of their cameras."""

    def __init__(self, pseudo: PseudoLabels, cameras: Tensor | None) -> None:
        labels = pseudo.labels.numpy()
        seen = np.full(len(labels), -1) if cameras is None else cameras.numpy()
        self.order = np.lexsort((seen, labels))
        self.order = self.order[np.searchsorted(labels[self.order], 0) :]  # outliers come first
        self.sizes = pseudo.sizes.numpy()
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.cameras = seen[self.order]
        same = labels[self.order]
        begins = np.flatnonzero(np.r_[True, (same[1:] != same[:-1]) | (self.cameras[1:] != self.cameras[:-1])])
        self.block = np.repeat(np.arange(len(begins)), np.diff(np.r_[begins, len(same)]))
        self.bounds = np.r_[begins, len(same)]

    def draw(self, rng: np.random.Generator, clusters: np.ndarray, count: int) -> np.ndarray:
        """(G,count) indices of images: of each of G clusters an anchor, and `count` - 1 others.

        The others are the cluster without a block: the images of the anchor's camera, or, where this leaves nothing
        or the camera is unknown, the anchor; a lone image is its own other.
        """
        start, size = self.starts[clusters], self.sizes[clusters]
        anchor = start + (rng.random(len(clusters)) * size).astype(np.int64)
        first, end = self.bounds[self.block[anchor]], self.bounds[self.block[anchor] + 1]
        alone = (self.cameras[anchor] < 0) | (end - first == size)
        first = np.where(alone, anchor, first)
        end = np.where(alone, anchor + (size > 1), end)
        place = start[:, None] + _draw_below(rng, size - (end - first), count - 1)
        place += (end - first)[:, None] * (place >= first[:, None])
        return self.order[np.concatenate([anchor[:, None], place], axis=1)]


def _draw_below(rng: np.random.Generator, limits: np.ndarray, count: int) -> np.ndarray:
    """(G,count) integers from 0 to below the limit (G,) of the row, all different where the limit allows it."""
    uniform = rng.random((len(limits), count))
    drawn = (uniform * limits[:, None]).astype(np.int64)
    enough = np.flatnonzero(limits >= count)
    picks = np.empty((len(enough), count), np.int64)
    for column in range(count):
        pick = (uniform[enough, column] * (limits[enough] - column)).astype(np.int64)
        for taken in np.sort(picks[:, :column], axis=1).T:
            pick += pick >= taken  # counts the numbers that are still free
        picks[:, column] = pick
    drawn[enough] = picks
    return drawn


def _passes(rng: np.random.Generator, count: int, passes: int) -> np.ndarray:
    """(passes,count): a permutation of 0..count-1 in each row."""
    return rng.permuted(np.tile(np.arange(count), (passes, 1)), axis=1)


def _whole_batches(images: int, batch_size: int) -> int:
    """Images of a pass that are used: those of whole batches, or all if they fill none."""
    return images // batch_size * batch_size or images
