"""The stage before: a network learns the classes of a labelled source, and sees the target in its norm layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.meta_arch import MetaArch, named_loss_inputs
from fastreid_uns.registry import META_ARCH_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels
from fastreid_uns.utils.transfer import to_device


@META_ARCH_REGISTRY.register()
class SourceModel(MetaArch):
    """A classifier of the source classes; target images take part in the norm statistics alone.

    Of the source rows of a batch, losses are offered `feats`, `pooled`, `unnormalized`, `logits` (B,C), `labels`,
    `index`, `cameras` and `domains`. The pseudo labels of the target are read by the sampler only.

    Args:
        capacity: rows of the classifier, the most classes that the sources may have.
        keys: those of `MetaArch`.

    Raises:
        ValueError: a parameter out of range, or a memory; in `update_memory`, no labelled source, or more classes than
            rows.

    Source: Ge et al. 2020 (MMT), official code, pre-training on the source domain.
    """

    def __init__(self, *parts: Any, capacity: int = 3000, **keys: Any) -> None:
        super().__init__(*parts, **keys)
        if self.memory is not None:
            raise InvalidValue("SourceModel: it trains a classifier and reads no memory. Set MODEL.MEMORY to null.")
        if capacity < 1:
            raise InvalidValue(f"SourceModel: MODEL.CAPACITY is {capacity}; 1 or more rows are accepted. Change it.")
        self.classes = 0
        self.classifier = nn.Parameter(torch.empty(capacity, self.encoder.dim))
        nn.init.normal_(self.classifier, std=0.001)

    def update_memory(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Count the classes of the sources."""
        if bank.source_labels is None:
            raise InvalidValue("SourceModel: DATASETS.SOURCES names no labelled set; it learns from nothing else.")
        self.classes = int(bank.source_labels.max()) + 1
        if self.classes > len(self.classifier):
            raise InvalidValue(
                f"SourceModel: {self.classes:,} classes of the sources for a classifier of {len(self.classifier):,} "
                f"rows. Raise MODEL.CAPACITY."
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_<name>` for each configured loss, and `accuracy` on the source rows."""
        out = self.encoder(batch.views[0], batch.domains)
        rows = to_device((batch.domains > 0).nonzero().flatten(), out.feats.device)
        every = named_loss_inputs(out, batch)
        inputs = {name: value[rows] for name, value in every.items()}
        with torch.autocast(rows.device.type, enabled=False):
            inputs["logits"] = inputs["unnormalized"] @ self.classifier[: self.classes].T
        outputs = self.losses(inputs)
        outputs["accuracy"] = (inputs["logits"].detach().argmax(1) == inputs["labels"]).float().mean()
        return outputs
