"""The model of ICE: a query view through the online encoder, and all views through the momentum encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.memory import Memory
from fastreid_uns.modeling.meta_arch import Baseline, named_loss_inputs
from fastreid_uns.modeling.proxies import CameraProxies
from fastreid_uns.registry import META_ARCH_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels
from fastreid_uns.utils import comm
from fastreid_uns.utils.transfer import to_device


@META_ARCH_REGISTRY.register()
class ICEModel(Baseline):
    """Queries of the online encoder against centroids, against keys of the momentum encoder and against camera proxies.

    The views of a batch are the query, the key (where there is no second view: the first again) and the weak view. The
    momentum encoder clusters, is evaluated and deployed, and gathers norm statistics of its own from every view in
    order; of the query it needs nothing else.

    Losses are offered what `Baseline` offers but `teacher_logits`, and: `teacher_feats` (B,D) of the key; `weak_feats`
    (B,D) if a loss wants them; `proxies` if a loss wants them, which needs camera labels.

    Args:
        unnormalized_queries: contrast with the memory by features before unit length, as ICE does; keys and proxies
            meet unit features in any case.

    Raises:
        ValueError: no momentum encoder, no memory, or unnormalized queries for one whose rows move; in
            `update_memory`, proxies on data without cameras, or labelled source sets; in `forward`, fewer views than
            the losses need.

    Source: Chen et al. 2021 (ICE), official trainer; differs: its forward pass of the key through the online encoder,
    whose features it does not use, is left out.
    """

    memory: Memory  # not without one
    teacher: Encoder

    def __init__(
        self, *parts: Any, momentum_encoder: bool = True, unnormalized_queries: bool = True, **keys: Any
    ) -> None:
        if not momentum_encoder:
            raise InvalidValue(
                "MODEL.MOMENTUM_ENCODER is false; ICEModel takes its keys from the momentum encoder. Set it to true."
            )
        super().__init__(*parts, momentum_encoder=True, **keys)
        if self.memory is None:
            raise InvalidValue("MODEL.MEMORY has no NAME; ICEModel contrasts with centroids. Name CentroidMemory.")
        if unnormalized_queries and self.memory.moves:
            raise InvalidValue(
                f"MODEL.UNNORMALIZED_QUERIES is true and MODEL.MEMORY is {type(self.memory).__name__}, whose rows move "
                f"towards queries of unit length. Set UNNORMALIZED_QUERIES to false, or name CentroidMemory."
            )
        self.unnormalized_queries = unnormalized_queries
        needed = {name for names in self.losses.input_names.values() for name in names}
        self.wants_weak = "weak_feats" in needed
        self.proxies = CameraProxies(self.encoder.dim) if "proxies" in needed else None

    def update_memory(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Make centroids and proxies anew from the features of the momentum encoder."""
        if bank.source_labels is not None:
            raise InvalidValue(
                "ICEModel: DATASETS.SOURCES names labelled sets; ICE is for unlabelled images only. Drop the section."
            )
        super().update_memory(pseudo, bank)
        if self.proxies is not None:
            self.proxies.reset(bank.feats, pseudo.labels, bank.cameras)

    def loss_inputs(self, batch: Batch) -> dict[str, Any]:
        """Every tensor that a loss can ask for, by name, and the proxies."""
        needed = 3 if self.wants_weak else 1
        if len(batch.views) < needed:
            raise InvalidValue(
                f"INPUT.VIEWS names {len(batch.views)} view(s); the losses of this model need {needed}: query, key and "
                f"weak view. Name that many presets of INPUT.AUGMENTS."
            )
        out = self.encoder(batch.views[0])
        inputs: dict[str, Any] = named_loss_inputs(out, batch)
        keys = self.keys(batch.views)
        inputs["teacher_feats"] = keys[min(1, len(keys) - 1)]
        if self.wants_weak:
            inputs["weak_feats"] = keys[2]
        if self.proxies is not None:
            inputs["proxies"] = self.proxies
        inputs["labels"] = self.memory.rows(batch)
        inputs["logits"] = self.memory(
            inputs["unnormalized"] if self.unnormalized_queries else out.feats, inputs["labels"]
        )
        return inputs

    @torch.no_grad()
    def keys(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Unit features (B,D) of the momentum encoder for each view (B,3,H,W), which go through it one by one.

        The images of all processes change places before its norm layers, so that a key does not share statistics with
        those that its query shared them with (shuffled batch norm); all views of a batch change places alike.
        """
        count = len(views[0])
        total = count * comm.world()
        order = to_device(torch.randperm(total), views[0].device)
        order = comm.all_gather(order, equal=True)[:total]  # that of rank 0 everywhere
        own = slice(comm.rank() * count, (comm.rank() + 1) * count)
        back = order.argsort()[own]
        shuffled = (comm.all_gather(images, equal=True)[order[own]] for images in views)
        return [comm.all_gather(self.teacher(images).feats, equal=True)[back] for images in shuffled]
