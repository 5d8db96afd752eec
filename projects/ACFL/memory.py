"""A feature of each image, replaced as it is seen, and the means of the clusters, kept up to date."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.memory import Memory
from fastreid_uns.registry import MEMORY_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels

from .losses import similarities


@MEMORY_REGISTRY.register()
class ReplacedMemory(Memory):
    """One row for each training image, overwritten by its feature of the step, and running means of the clusters.

    The sum of a cluster changes by the new feature minus the old one, so the means cost no pass over the rows. They
    start anew, from the features of the bank, with each clustering. Outliers keep their rows but belong to no mean.

    Args:
        dim: D.
        temperature: divides the similarities, > 0.
        fraction: share of the training images whose features are held, in (0, 1]. Below 1 the rows are a queue: the
            rows that were written longest ago leave, but never the last one of a cluster. At a clustering the images
            queue in a fixed random order. A row that is not held is zero; its place is not given back to the machine.
        unit: give the means unit length.

    Raises:
        ValueError: a parameter out of range; in `reset`, a bank with labelled source images.

    Source: ACFL, algorithm 1, lines 6 and 13; the queue: table 10.
    """

    labels: Tensor
    sums: Tensor
    counts: Tensor
    written: Tensor

    def __init__(self, dim: int, *, temperature: float = 0.05, fraction: float = 1.0, unit: bool = False) -> None:
        super().__init__(dim, momentum=0.0, temperature=temperature)
        if not 0 < fraction <= 1:
            raise InvalidValue(f"MODEL.MEMORY.FRACTION is {fraction}; a share in (0, 1] is accepted. Change it.")
        self.fraction = fraction
        self.unit = unit
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))  # (N,) -1 = in no cluster
        self.register_buffer("sums", torch.zeros(0, dim))  # (K,D) of the rows held
        self.register_buffer("counts", torch.zeros(0))  # (K,) rows held
        self.register_buffer("written", torch.zeros(0, dtype=torch.int64))  # (N,) all different, -1 = not held

    def reset(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Rows = features of the bank; sums and counts of the new clusters."""
        if bank.source_feats is not None:
            raise InvalidValue(
                "ReplacedMemory: the bank has labelled source images; this memory holds unlabelled ones only. Drop "
                "DATASETS.SOURCES, or take another MODEL.MEMORY."
            )
        device = self.features.device
        self.features = bank.feats.to(device, torch.float32)
        self.labels = pseudo.labels.to(device)
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(0)).to(device)
        self.written = order.masked_fill(self.labels < 0, -1) if self.fraction < 1 else order
        if self.fraction < 1:
            excess = int(pseudo.sizes.sum()) - max(self.capacity, pseudo.num_clusters)
            self.written[self._leaving(pseudo.num_clusters)[: max(0, excess)]] = -1
            self.features = self.features * (self.written >= 0)[:, None]
        members = ((self.labels >= 0) & (self.written >= 0)).nonzero().flatten()
        clusters = self.labels[members]
        self.counts = clusters.bincount(minlength=pseudo.num_clusters).float()
        empty = self.features.new_zeros(pseudo.num_clusters, self.features.shape[1])
        self.sums = empty.index_add_(0, clusters, self.features[members])

    @property
    def capacity(self) -> int:
        """Rows that are held, unless there are more clusters than that."""
        return round(self.fraction * len(self.labels))

    @property
    def centroids(self) -> Tensor:
        """(K,D) means of the rows of each cluster, of unit length if `unit`."""
        means = self.sums / self.counts[:, None]
        return F.normalize(means) if self.unit else means

    def rows(self, batch: Batch) -> Tensor:
        """(B,) the row of each image."""
        return batch.index

    def hardest(self, feats: Tensor, labels: Tensor) -> Tensor:
        """(B,K) similarity to the least similar row of the own cluster and to the most similar one of each other.

        Args:
            feats: (B,D) unit length; they get the gradient.
            labels: (B,) own cluster.
        """
        count = len(self.counts)
        place = torch.where((self.labels < 0) | (self.written < 0), count, self.labels).expand(len(feats), -1)
        own = place == labels[:, None]
        sign = 1.0 - 2.0 * own.float()
        signed = sign * similarities(feats, self.features)
        most = signed.new_zeros(len(feats), count + 1).scatter_reduce(1, place, signed, "amax", include_self=False)
        most = most[:, :count]
        return most.scatter(1, labels[:, None], -most.gather(1, labels[:, None]))

    def _moved(self, feats: Tensor, labels: Tensor, most: int | None) -> Tensor:
        """The rows after the batch has been written; of a repeated image the last feature stays."""
        rows, position = labels, torch.arange(len(labels), device=labels.device)
        last = ((rows[:, None] == rows[None]) * position).amax(1)
        clusters = self.labels[rows]
        member = (clusters >= 0).to(feats)[:, None]
        counted = member * (last == position)[:, None]  # once for each image
        held = (self.written[rows] >= 0).to(feats)[:, None]
        clusters, feats = clusters.clamp_min(0), feats[last]
        self.sums = self.sums.index_add(0, clusters, counted * (feats - held * self.features[rows]))
        if self.fraction == 1:
            return self.features.index_copy(0, rows, feats)
        self.counts = self.counts.index_add(0, clusters, (counted * (1 - held)).flatten())
        now = (self.written.max() + 1 + last).masked_fill(self.labels[rows] < 0, -1)
        self.written = self.written.index_copy(0, rows, now)
        return self._without_oldest(self.features.index_copy(0, rows, member * feats), len(rows))

    def _without_oldest(self, features: Tensor, most: int) -> Tensor:
        """The rows after those beyond the capacity, at most `most`, have left; without a word to the host."""
        leaving = self._leaving(len(self.counts))[:most]
        newest = self._newest(len(self.counts))
        excess = (self.written >= 0).sum() - self.capacity
        may = (self.written[leaving] >= 0) & (self.written[leaving] < newest[self.labels[leaving]])
        gone = may & (torch.arange(len(leaving), device=leaving.device) < excess)
        weight = gone.to(features)[:, None]
        clusters = self.labels[leaving].clamp_min(0)
        self.sums = self.sums.index_add(0, clusters, -weight * features[leaving])
        self.counts = self.counts.index_add(0, clusters, -weight.flatten())
        self.written = self.written.index_copy(0, leaving, self.written[leaving].masked_fill(gone, -1))
        return features.index_copy(0, leaving, features[leaving] * (1 - weight))

    def _newest(self, clusters: int) -> Tensor:
        """(K,) when the latest row of each cluster was written."""
        held = self.written.masked_fill(self.labels < 0, -1)
        none = held.new_full((clusters,), -1)
        return none.scatter_reduce(0, self.labels.clamp_min(0), held, "amax")

    def _leaving(self, clusters: int) -> Tensor:
        """(N,) rows in the order in which they may leave: the oldest first; at the end those that never may."""
        newest = self._newest(clusters)[self.labels.clamp_min(0)]
        may = (self.written >= 0) & (self.written < newest)
        return self.written.masked_fill(~may, torch.iinfo(torch.int64).max).argsort()
