"""What support samples add to the losses: they face the memory, and stay with the images of their identity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import at_least_float32, similarity
from fastreid_uns.registry import LOSS_REGISTRY
from fastreid_uns.utils.comm import all_gather, all_gather_with_gradient

EPSILON = 1e-6  # of the released code, within and beside the fraction


@LOSS_REGISTRY.register()
class SupportedContrastLoss(nn.Module):
    """Mean cross entropy of images and supports together, each against the label of its image.

    Source: Zhang et al. 2022 (ISE), memory loss over 2B rows.
    """

    def forward(self, logits: Tensor, support_logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar; both logits (B,K), labels (B,) in 0..K-1."""
        both = torch.cat([at_least_float32(logits), at_least_float32(support_logits)])
        return F.cross_entropy(both, labels.repeat(2))


@LOSS_REGISTRY.register()
class LabelPreservingLoss(nn.Module):
    """Each image is nearer to the farthest support of its identity than to the nearest ones of all others.

    With g_ij = exp(f_i s_j / temperature) and p_i the least g_ij over the supports of the own identity (the own one
    among them): the mean over i of -log(p_i / (p_i + n_i)), n_i the sum over the other identities of the batch of their
    largest g_ij. The batch is that of all processes.

    Args:
        temperature: divides the similarities, > 0.

    Raises:
        ValueError: a temperature out of range.

    Source: Zhang et al. 2022 (ISE), label-preserving loss; differs: identities are grouped by their labels, where the
    official code cuts a batch into runs of equal length.
    """

    def __init__(self, *, temperature: float = 0.6) -> None:
        super().__init__()
        if temperature <= 0:
            raise InvalidValue(f"LabelPreservingLoss: TEMPERATURE is {temperature}; a number above 0 is accepted.")
        self.temperature = temperature

    def forward(self, feats: Tensor, supports: Tensor, labels: Tensor) -> Tensor:
        """Scalar; feats and supports (B,D) unit length, labels (B,)."""
        feats, supports = (all_gather_with_gradient(at_least_float32(rows)) for rows in (feats, supports))
        labels = all_gather(labels, equal=True)
        with torch.autocast(feats.device.type, enabled=False):
            near = (similarity(feats, supports) / self.temperature).exp()
        same = labels[:, None] == labels
        first = same.int().argmax(1)  # an identity counts as a column: that of its first image
        positive = near.masked_fill(~same, torch.inf).amin(1)
        largest = torch.zeros_like(near).scatter_reduce(1, first.expand_as(near), near, "amax")
        own = first[:, None] == torch.arange(len(first), device=first.device)
        negative = largest.masked_fill(own, 0.0).sum(1)
        return -(positive / (positive + negative + EPSILON) + EPSILON).log().mean()
