"""Several views of each image, side by side in one batch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastreid_uns.modeling.meta_arch import MetaArch, named_loss_inputs
from fastreid_uns.registry import META_ARCH_REGISTRY
from fastreid_uns.structures import Batch
from fastreid_uns.utils.comm import all_gather


@META_ARCH_REGISTRY.register()
class InBatchModel(MetaArch):
    """All V views of an image go through the encoder, and each is a row of the batch that the losses see.

    The rows of an image stand side by side, so that images that share norm statistics share those of all their views:
    `MODEL.GHOST_BATCH` counts rows, V for each image. Losses are offered `feats, pooled, labels, index, cameras,
    domains` of the rows, and what else the head gives (`raw`, `parts`, `raw_parts`); `index` tells which rows show the
    same image.

    Source: TMP, section 3 and algorithm 1: no memory, no momentum encoder.
    """

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_<name>` for each configured loss, and `positives`, the mean number of positives of a row."""
        inputs = self.loss_inputs(batch)
        outputs = self.losses(inputs)
        labels = all_gather(inputs["labels"], equal=True)
        outputs["positives"] = (labels[:, None] == labels[None]).sum(1).float().mean() - 1
        return outputs

    def loss_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Every tensor that a loss can ask for, by name, with V x B rows."""
        images = torch.stack(batch.views, dim=1).flatten(0, 1)
        rows = batch._replace(views=()).rows(torch.arange(len(images)) // len(batch.views))
        return named_loss_inputs(self.encoder(images, rows.domains), rows)
