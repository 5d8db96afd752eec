"""Contrast with proxies that are associated with an image within the step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import at_least_float32
from fastreid_uns.modeling.proxies import CameraProxies, Proxies, sum_over_cameras
from fastreid_uns.registry import LOSS_REGISTRY


@torch.no_grad()
def online_positives(scores: Tensor, cameras: Tensor, count: int) -> Tensor:
    """(B,R) bool: the best proxy of each camera, and of these the `count` best; fewer where there are fewer cameras.

    Args:
        scores: (B,R).
        cameras: (R,) int64 of each proxy.
        count: at least 1.

    Source: Wang et al. 2022 (O2CAP), official code.
    """
    # a number below R for each camera, found without asking the device how many cameras there are
    group = torch.searchsorted(cameras.sort().values, cameras).expand_as(scores)
    best = torch.full_like(scores, -torch.inf).scatter_reduce(1, group, scores, "amax")
    of_camera = scores.masked_fill(scores < best.gather(1, group), -torch.inf)
    values, chosen = of_camera.topk(min(count, scores.shape[1]), dim=1)
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, values > -torch.inf)


@LOSS_REGISTRY.register()
class OnlineProxyLoss(nn.Module):
    """Contrast of each image with the proxies that are like it and like its own proxy, whatever their cluster.

    With q an image, p its proxy and s_r = w q.P_r + (1 - w) p.P_r, the positives are the `positives` best of the best
    proxies of all cameras, and the negatives the `negatives` best of all others, also of the own cluster. The loss of
    an image is logsumexp over both of q.P / t less the mean over the positives; the mean over the images of a camera is
    summed over the cameras of the batch. An image whose cluster has no proxy in its camera costs nothing.

    Args:
        temperature: t, > 0.
        positives: at most; there are no more than cameras.
        negatives: at most, at least 1.
        own_weight: w, share of the image itself in the score, in [0, 1].

    Raises:
        ValueError: a key out of range.

    Source: Wang et al. 2022 (O2CAP), online loss, official code; differs: fewer proxies or cameras than asked for are
    taken as they are.
    """

    def __init__(
        self, *, temperature: float = 0.07, positives: int = 3, negatives: int = 50, own_weight: float = 0.15
    ) -> None:
        super().__init__()
        for key, value, good, accepted in (
            ("TEMPERATURE", temperature, temperature > 0, "a number above 0 is"),
            ("POSITIVES", positives, positives >= 1, "1 or more are"),
            ("NEGATIVES", negatives, negatives >= 1, "1 or more are"),
            ("OWN_WEIGHT", own_weight, 0 <= own_weight <= 1, "a share in [0, 1] is"),
        ):
            if not good:
                raise InvalidValue(f"OnlineProxyLoss: {key} is {value}; {accepted} accepted. Change MODEL.LOSSES.")
        self.temperature, self.positives, self.negatives = temperature, positives, negatives
        self.own_weight = own_weight

    def forward(self, feats: Tensor, labels: Tensor, cameras: Tensor, proxies: CameraProxies | Proxies) -> Tensor:
        """Scalar, with gradient to `feats` only; feats (B,D) unit length, labels and cameras (B,)."""
        own = (labels[:, None] == proxies.labels) & (cameras[:, None] == proxies.cameras)
        with torch.autocast(feats.device.type, enabled=False):
            feats = at_least_float32(feats)
            rows = proxies.features.to(feats)
            similarity = feats @ rows.T
            positive, negative = self.associate(similarity.detach(), rows[own.int().argmax(1)] @ rows.T, proxies)
        logits = similarity / self.temperature
        total = logits.masked_fill(~(positive | negative), -torch.inf).logsumexp(1)
        losses = total - logits.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)
        return sum_over_cameras(losses.masked_fill(~own.any(1), 0.0), cameras)

    @torch.no_grad()
    def associate(self, own: Tensor, of_proxy: Tensor, proxies: CameraProxies | Proxies) -> tuple[Tensor, Tensor]:
        """Which proxies are positives and negatives, each (B,R) bool.

        Args:
            own: (B,R) similarity of the images to the proxies.
            of_proxy: (B,R) similarity of the images' proxies to the proxies.
        """
        scores = self.own_weight * own + (1 - self.own_weight) * of_proxy
        positive = online_positives(scores, proxies.cameras, self.positives)
        values, hardest = scores.masked_fill(positive, -torch.inf).topk(min(self.negatives, scores.shape[1]), dim=1)
        return positive, torch.zeros_like(positive).scatter(1, hardest, values > -torch.inf)
