"""The model: unified contrast with the hybrid memory, which is itself what is clustered."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.meta_arch import Baseline
from fastreid_uns.registry import META_ARCH_REGISTRY
from fastreid_uns.structures import Batch

from .memory import HybridMemory


@META_ARCH_REGISTRY.register()
class SpCLModel(Baseline):
    """Features of the first view against source classes, clusters and single images.

    `logits` and `labels` that losses are offered count the source classes first, then the clusters.

    Raises:
        ValueError: the memory is no `HybridMemory`.

    Source: Ge et al. 2020 (SpCL), unified contrastive learning.
    """

    memory: HybridMemory

    def __init__(self, *parts: Any, **keys: Any) -> None:
        super().__init__(*parts, **keys)
        if not isinstance(self.memory, HybridMemory):
            found = "none" if self.memory is None else type(self.memory).__name__
            raise InvalidValue(
                f"MODEL.MEMORY.NAME: SpCLModel got {found}; it clusters its memory and needs HybridMemory. Change it."
            )

    def loss_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Every tensor that a loss can ask for, by name; in training the memory is updated."""
        inputs = super().loss_inputs(batch)
        for name in ("logits", "teacher_logits"):
            if name in inputs:
                inputs[name] = self.memory.label_logits(inputs[name])
        inputs["labels"] = batch.labels
        return inputs

    def memory_bank(self) -> Tensor | None:
        """(N,D) rows of the unlabelled images; None before the first clustering, which needs fresh features."""
        return self.memory.instances
