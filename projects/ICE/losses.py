"""The losses of ICE: hard and soft contrast of instances with the momentum encoder, contrast with camera proxies."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import all_keys, similarity
from fastreid_uns.registry import LOSS_REGISTRY
from fastreid_uns.utils import comm


@LOSS_REGISTRY.register()
class HardInstanceLoss(nn.Module):
    """Contrast of each image with the least similar key of its cluster, against all keys of other clusters.

    Keys are the momentum features of the images of all processes, the image's own second view among them. A batch of
    one cluster costs nothing.

    Args:
        temperature: divides the similarities, > 0.

    Raises:
        ValueError: temperature out of range.

    Source: Chen et al. 2021 (ICE), hard instance contrastive loss; differs from the released code: images may have
    different numbers of negatives.
    """

    def __init__(self, *, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = _above_zero("HardInstanceLoss", temperature)

    def forward(self, feats: Tensor, teacher_feats: Tensor, labels: Tensor) -> Tensor:
        """Scalar, with gradient to `feats` only; both features (B,D) unit length, labels (B,)."""
        with torch.autocast(feats.device.type, enabled=False):
            logits = similarity(feats, all_keys(teacher_feats)) / self.temperature
            same = labels[:, None] == comm.all_gather(labels, equal=True)
            hardest = logits.masked_fill(~same, torch.inf).amin(1, keepdim=True)
            against = torch.cat([hardest, logits.masked_fill(same, -torch.inf)], dim=1).logsumexp(1)
            return (against - hardest[:, 0]).mean()


@LOSS_REGISTRY.register()
class SoftInstanceLoss(nn.Module):
    """How far the similarities of a strongly changed image are from those of the image as it is.

    With k0 and k2 the momentum features of the weak and the second strong view of the images of all processes, the mean
    over the images i of KL(softmax_j(k0_i k0_j / t) || softmax_j(q_i k2_j / t)); j = i is included on both sides.

    Args:
        temperature: t, > 0.

    Raises:
        ValueError: temperature out of range.

    Source: Chen et al. 2021 (ICE), soft instance consistency loss; official trainer.
    """

    def __init__(self, *, temperature: float = 0.4) -> None:
        super().__init__()
        self.temperature = _above_zero("SoftInstanceLoss", temperature)

    def forward(self, feats: Tensor, teacher_feats: Tensor, weak_feats: Tensor) -> Tensor:
        """Scalar, with gradient to `feats` only; all (B,D) unit length."""
        with torch.autocast(feats.device.type, enabled=False):
            logits = similarity(feats, all_keys(teacher_feats)) / self.temperature
            target = similarity(weak_feats.detach(), all_keys(weak_feats)) / self.temperature
            return F.kl_div(logits.log_softmax(1), target.log_softmax(1), reduction="batchmean", log_target=True)


def _above_zero(loss: str, temperature: float) -> float:
    if temperature <= 0:
        raise InvalidValue(f"{loss}: TEMPERATURE is {temperature}; a number above 0 is accepted. Change MODEL.LOSSES.")
    return temperature
