"""Contrast with a memory of camera proxies."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.meta_arch import Baseline, named_loss_inputs
from fastreid_uns.registry import META_ARCH_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels

from .memory import ProxyMemory


@META_ARCH_REGISTRY.register()
class CAPModel(Baseline):
    """Images against the proxies of a `ProxyMemory`, as they were before the step moves them.

    Losses are offered what `Baseline` offers, but `labels` are clusters and not rows, `logits` (B,R) are cosines to the
    proxies, and `proxies` are these themselves.

    Raises:
        ValueError: another memory, or a momentum encoder; in `update_memory`, images of unknown cameras or of one
            camera only, or labelled source sets.

    Source: Wang et al. 2021 (CAP), official code.
    """

    memory: ProxyMemory  # not without one

    def __init__(self, *parts: Any, **keys: Any) -> None:
        super().__init__(*parts, **keys)
        if not isinstance(self.memory, ProxyMemory):
            raise InvalidValue(
                f"MODEL.MEMORY is {type(self.memory).__name__}; CAPModel contrasts with camera proxies. Set "
                f"MODEL.MEMORY.NAME to ProxyMemory."
            )
        if self.teacher is not None:
            raise InvalidValue("MODEL.MOMENTUM_ENCODER is true; CAPModel has no use for one. Set it to false.")

    def update_memory(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Make the proxies anew."""
        if bank.source_labels is not None:
            raise InvalidValue(
                "CAPModel: DATASETS.SOURCES names labelled sets; CAP is for unlabelled images only. Drop the section."
            )
        clustered = bank.cameras[(pseudo.labels >= 0).to(bank.cameras.device)]
        unknown, known = int((clustered < 0).sum()), len(clustered[clustered >= 0].unique())
        if unknown or known < 2:
            raise InvalidValue(
                f"CAPModel: of the {len(clustered):,} clustered images {unknown:,} are of an unknown camera and the "
                f"others of {known}; each needs one, and there must be two or more. Train on a data set with cameras, "
                f"or use a method that reads none."
            )
        super().update_memory(pseudo, bank)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_<name>` for each configured loss, and `accuracy` of the cluster of the nearest proxy."""
        inputs = self.loss_inputs(batch)
        outputs = self.losses(inputs)
        nearest = inputs["proxies"].labels[inputs["logits"].detach().argmax(1)]
        outputs["accuracy"] = (nearest == batch.labels).float().mean()
        return outputs

    def loss_inputs(self, batch: Batch) -> dict[str, Any]:
        """See the class; in training the memory is updated."""
        out = self.encoder(batch.views[0], batch.domains)
        inputs: dict[str, Any] = named_loss_inputs(out, batch)
        inputs["proxies"] = self.memory.proxies
        inputs["logits"] = self.memory(out.feats, self.memory.rows(batch), batch.most)
        return inputs
