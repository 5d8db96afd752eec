"""Cluster contrast of the whole image and of its parts, and a classifier beside each memory."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.memory import ClusterMemory
from fastreid_uns.modeling.meta_arch import Baseline
from fastreid_uns.pseudo_labels.base import centroids
from fastreid_uns.registry import META_ARCH_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels
from fastreid_uns.utils import comm


@META_ARCH_REGISTRY.register()
class NCPLRModel(Baseline):
    """A memory and a classifier for the whole image, and, with a `PartHead`, for each part.

    Beside what `Baseline` offers, losses are offered `class_logits` (B,K), products of the features before unit length
    with the rows of the classifier; `part_logits` and `part_class_logits` (B,P,K) of the parts; `neighbours` and
    `neighbour_distance` (B,m) of each image in the latest clustering.

    Each part has a copy of the configured memory. The classifiers have a fixed number of rows, of which the first K are
    in use: they are set to the unit means of the clusters after each clustering and then trained.

    Args:
        capacity: rows of each classifier, the most clusters that there may be; never more than training images.
        keys: those of `Baseline`.

    Raises:
        ValueError: a parameter out of range, or a memory that is no `ClusterMemory`; in `update_memory`, more clusters
            than rows, labels without neighbours, or labelled sources.

    Source: NCPLR and GL-NCPLR, official code.
    """

    memory: ClusterMemory
    neighbours: Tensor
    neighbour_distance: Tensor

    def __init__(self, *parts: Any, capacity: int = 3000, **keys: Any) -> None:
        super().__init__(*parts, **keys)
        if not isinstance(self.memory, ClusterMemory):
            found = "none" if self.memory is None else type(self.memory).__name__
            raise InvalidValue(f"MODEL.MEMORY.NAME: NCPLRModel got {found}; set it to ClusterMemory.")
        if capacity < 1:
            raise InvalidValue(f"NCPLRModel: MODEL.CAPACITY is {capacity}; 1 or more rows are accepted. Change it.")
        self.parts = len(getattr(self.encoder.head, "part_embed", ()))
        self.capacity = min(capacity, self.num_images)
        self.clusters = 0
        self.part_memories = nn.ModuleList(copy.deepcopy(self.memory) for _ in range(self.parts))
        self.classifiers = nn.Parameter(torch.zeros(1 + self.parts, self.capacity, self.encoder.dim))
        self.register_buffer("neighbours", torch.zeros(self.num_images, 0, dtype=torch.int64), persistent=False)
        self.register_buffer("neighbour_distance", torch.zeros(self.num_images, 0), persistent=False)

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """`feats` (B,D), and for the clustering `parts` (B,P,D) if there are parts."""
        out = self.deploy(images)
        return {"feats": out.feats} if out.parts is None else {"feats": out.feats, "parts": out.parts}

    @torch.no_grad()
    def update_memory(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Make all memories anew, aim the classifiers at the clusters, keep the neighbours."""
        self._check(pseudo, bank)
        branches = [bank.feats, *(bank.extras["parts"].unbind(1) if self.parts else ())]
        rows = torch.stack([centroids(feats, pseudo.labels) for feats in branches])
        # sums on CUDA differ in the last bit from process to process, parameters must not
        rows = comm.broadcast_object(rows.cpu()).to(self.classifiers.device)
        self.clusters = pseudo.num_clusters
        self.classifiers[:, : self.clusters] = rows
        for memory, own, feats in zip((self.memory, *self.part_memories), rows, branches, strict=True):
            memory.reset(replace(pseudo, centroids=own), replace(bank, feats=feats))  # type: ignore[operator]
        self.neighbours = pseudo.extras["neighbours"].to(rows.device)
        self.neighbour_distance = pseudo.extras["neighbour_distance"].to(rows.device)

    def _check(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        if bank.source_feats is not None:
            raise InvalidValue("NCPLRModel: labelled sources were found, but its classifiers know clusters only.")
        if "neighbours" not in pseudo.extras:
            raise InvalidValue(
                f"NCPLRModel: the labels hold {', '.join(pseudo.extras) or 'nothing'} beside the clusters; the "
                f"neighbours of each image are needed. Set PSEUDO_LABELS.NAME to NeighbourLabels."
            )
        if pseudo.num_clusters > self.capacity:
            raise InvalidValue(
                f"NCPLRModel: {pseudo.num_clusters:,} clusters for classifiers of {self.capacity:,} rows. Raise "
                f"MODEL.CAPACITY, or raise PSEUDO_LABELS.EPS for fewer clusters."
            )

    def loss_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """See the class."""
        inputs = super().loss_inputs(batch)
        unnormalized = inputs["unnormalized"][:, None]
        if self.parts:
            unnormalized = torch.cat([unnormalized, inputs["unnormalized_parts"]], dim=1)
            said = [
                memory(feats, inputs["labels"], batch.most)
                for memory, feats in zip(self.part_memories, inputs["parts"].unbind(1), strict=True)
            ]
            inputs["part_logits"] = torch.stack(said, dim=1)
        with torch.autocast(unnormalized.device.type, enabled=False):
            logits = torch.einsum("bpd,pkd->bpk", unnormalized, self.classifiers[:, : self.clusters])
        inputs["class_logits"] = logits[:, 0]
        if self.parts:
            inputs["part_class_logits"] = logits[:, 1:]
        inputs["neighbours"] = self.neighbours[batch.index]
        inputs["neighbour_distance"] = self.neighbour_distance[batch.index]
        return inputs
