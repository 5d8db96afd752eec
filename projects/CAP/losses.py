"""The contrast of images with the proxies of their own camera."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import at_least_float32
from fastreid_uns.modeling.proxies import CameraProxies, Proxies, sum_over_cameras
from fastreid_uns.registry import LOSS_REGISTRY


@LOSS_REGISTRY.register()
class IntraCameraLoss(nn.Module):
    """Contrast of each image with its proxy against all proxies of its camera.

    The mean over the images of a camera, summed over the cameras of the batch. An image whose cluster has no proxy in
    its camera costs nothing.

    Args:
        temperature: divides the similarities, > 0.

    Raises:
        ValueError: temperature out of range.

    Source: Wang et al. 2021 (CAP), intra-camera loss, official code.
    """

    def __init__(self, *, temperature: float = 0.07) -> None:
        super().__init__()
        if temperature <= 0:
            raise InvalidValue(
                f"IntraCameraLoss: TEMPERATURE is {temperature}; a number above 0 is accepted. Change MODEL.LOSSES."
            )
        self.temperature = temperature

    def forward(self, feats: Tensor, labels: Tensor, cameras: Tensor, proxies: CameraProxies | Proxies) -> Tensor:
        """Scalar, with gradient to `feats` only; feats (B,D) unit length, labels and cameras (B,)."""
        with torch.autocast(feats.device.type, enabled=False):
            feats = at_least_float32(feats)
            logits = feats @ proxies.features.to(feats).T / self.temperature
        here = cameras[:, None] == proxies.cameras
        own = here & (labels[:, None] == proxies.labels)
        known = own.any(1)
        # an image without a proxy takes every one, so that its gradient is zero instead of not a number
        total = logits.masked_fill(~(here | ~known[:, None]), -torch.inf).logsumexp(1)
        losses = total - logits.masked_fill(~own, 0.0).sum(1)
        return sum_over_cameras(losses.masked_fill(~known, 0.0), cameras)
