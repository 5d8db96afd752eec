"""Centroids of clusters that stay during an epoch, and camera proxies with the contrast of images with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import at_least_float32
from fastreid_uns.modeling.memory import Memory, source_rows, take_shapes
from fastreid_uns.registry import LOSS_REGISTRY, MEMORY_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels
from fastreid_uns.utils import comm

POSITIVES = ("all", "other")
AXES = ("cosine", "coordinates")


@MEMORY_REGISTRY.register()
class CentroidMemory(Memory):
    """One row for each source class and each cluster: the plain mean of its unit features, at most of unit length.

    Rows change at a clustering only.

    Args:
        dim: D, length of a row.
        temperature: divides the similarities, > 0.

    Raises:
        ValueError: temperature out of range.

    Source: Chen et al. 2021 (ICE), official trainer: centroids are not brought to unit length.
    """

    moves = False

    def __init__(self, dim: int, *, temperature: float = 0.5) -> None:
        super().__init__(dim, momentum=1.0, temperature=temperature)

    @torch.no_grad()
    def reset(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Rows = centroids of the source classes, then the means of the clusters."""
        labels = pseudo.labels.to(bank.feats.device)
        kept = labels >= 0
        total = bank.feats.new_zeros(pseudo.num_clusters, bank.feats.shape[1], dtype=torch.float32)
        total.index_add_(0, labels[kept], bank.feats[kept].float())
        means = total / pseudo.sizes.to(total)[:, None]
        self.features = torch.cat([*source_rows(bank), means]).to(self.features.device)

    def rows(self, batch: Batch) -> Tensor:
        """(B,) the label of each image."""
        return batch.labels


class Proxies(NamedTuple):
    """One row for each cluster in each camera that sees it."""

    features: Tensor  # (R,D) unit length, float32
    labels: Tensor  # (R,) int64, cluster of each proxy
    cameras: Tensor  # (R,) int64, from 0


@torch.no_grad()
def camera_means(feats: Tensor, labels: Tensor, cameras: Tensor) -> Proxies:
    """Unit-length mean of the images of each cluster in each camera, sorted by cluster and camera.

    Args:
        feats: (N,D) unit length.
        labels: (N,) clusters from 0; images with -1 count nowhere.
        cameras: (N,) cameras from 0; images of an unknown one, -1, count nowhere.
    """
    kept = (labels >= 0) & (cameras >= 0)
    labels, cameras = labels[kept], cameras[kept]
    count = int(cameras.max()) + 1 if len(cameras) else 1
    pairs, rows = torch.unique(labels * count + cameras, return_inverse=True)
    total = feats.new_zeros(len(pairs), feats.shape[1], dtype=torch.float32)
    total.index_add_(0, rows, feats[kept].float())
    return Proxies(F.normalize(total), pairs // count, pairs % count)


class CameraProxies(nn.Module):
    """The R proxies of a clustering; constant until the next `reset`.

    Args:
        dim: D, length of a proxy.

    Attributes:
        features: (R,D) unit length, float32.
        labels: (R,) int64, cluster of each proxy.
        cameras: (R,) int64, from 0.

    Source: Chen et al. 2021 (ICE), official trainer.
    """

    features: Tensor
    labels: Tensor
    cameras: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(0, dim))
        self.register_buffer("labels", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("cameras", torch.zeros(0, dtype=torch.int64))

    @torch.no_grad()
    def reset(self, feats: Tensor, labels: Tensor, cameras: Tensor) -> None:
        """Make the proxies anew, sorted by cluster and camera, on the device of the old ones.

        Args:
            feats: (N,D) unit length, any device.
            labels: (N,) clusters from 0; images with -1 count nowhere.
            cameras: (N,) cameras from 0; images of an unknown one, -1, count nowhere.

        Raises:
            ValueError: fewer than two cameras are left, so there is nothing to bring together.
        """
        device = self.features.device
        labels, cameras = labels.to(device), cameras.to(device)
        kept = (labels >= 0) & (cameras >= 0)
        known = cameras[kept].unique()
        if len(known) < 2:
            raise InvalidValue(
                f"camera proxies: the {int((labels >= 0).sum()):,} clustered images are of {len(known)} known "
                f"camera(s); two or more are needed. Train on a data set with cameras, or drop the camera loss: "
                f"MODEL.LOSSES.camera null, MODEL.CAMERA_WEIGHT 0, or another MODEL.NAME than ACFLCamera."
            )
        self.features, self.labels, self.cameras = camera_means(feats.to(self.features), labels, cameras)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        take_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def camera_proxy_loss(
    feats: Tensor,
    labels: Tensor,
    cameras: Tensor,
    proxies: CameraProxies | Proxies,
    *,
    temperature: float = 0.07,
    negatives: int = 50,
    positives: str = "all",
    axis: str = "cosine",
) -> Tensor:
    """Contrast of each image with the proxies of its cluster and the most similar ones of other clusters.

    With s = similarity / temperature, P the positives and A their union with the `negatives` most similar proxies of
    other clusters, the loss of an image is the mean over p in P of logsumexp_A(s) - s_p.

    Args:
        feats: (B,D) unit length; half precision is computed in float32.
        labels: (B,) cluster of each image.
        cameras: (B,) camera of each image; an unknown one, -1, costs nothing.
        proxies: what to contrast with.
        temperature: divides the similarities, > 0.
        negatives: proxies of other clusters, at least 1; fewer where there are fewer.
        positives: `all` proxies of the cluster, the image's own camera included, or those of `other` cameras; an image
            without any costs nothing.
        axis: `cosine`, or `coordinates`: each coordinate of the proxies has unit length over all proxies, and where
            there are too few negatives the positives take the free places, as in the released code of ICE.

    Returns:
        (B,) losses, with gradient to `feats`.

    Raises:
        ValueError: unknown `positives` or `axis`, or a number out of range.

    Source: Chen et al. 2021 (ICE), official trainer; `other` as in Cho et al. 2022 (PPLR), official code.
    """
    check_proxy_keys(temperature, negatives, positives, axis)
    with torch.autocast(feats.device.type, enabled=False):
        feats = at_least_float32(feats)
        rows = F.normalize(proxies.features, dim=0) if axis == "coordinates" else proxies.features
        logits = feats @ rows.to(feats).T / temperature
        own = labels[:, None] == proxies.labels
        positive = own & (cameras[:, None] >= 0)
        if positives == "other":
            positive &= cameras[:, None] != proxies.cameras
        apart = logits.masked_fill(own, -torch.inf)
        hardest = apart.detach().topk(min(negatives, logits.shape[1]), dim=1).indices
        negative = (logits if axis == "coordinates" else apart).gather(1, hardest)
        count = positive.sum(1)
        # an image without positives takes every proxy, so that its gradient is zero instead of not a number
        kept = positive | (count == 0)[:, None]
        total = torch.cat([logits.masked_fill(~kept, -torch.inf), negative], dim=1).logsumexp(1)
        mean = logits.masked_fill(~positive, 0.0).sum(1) / count.clamp_min(1)
        return (total - mean).masked_fill(count == 0, 0.0)


def check_proxy_keys(temperature: float, negatives: int, positives: str, axis: str) -> None:
    """Refuse what `camera_proxy_loss` cannot compute.

    Raises:
        ValueError: with the key and what it accepts.
    """
    if temperature <= 0:
        raise InvalidValue(f"camera proxy loss: TEMPERATURE is {temperature}; a number above 0 is accepted. Change it.")
    if negatives < 1:
        raise InvalidValue(f"camera proxy loss: NEGATIVES is {negatives}; 1 or more is accepted. Raise it.")
    for key, value, accepted in (("POSITIVES", positives, POSITIVES), ("AXIS", axis, AXES)):
        if value not in accepted:
            raise InvalidValue(
                f"camera proxy loss: {key} is {value!r}; accepted: {', '.join(accepted)}. Change MODEL.LOSSES."
            )


def sum_over_cameras(losses: Tensor, cameras: Tensor) -> Tensor:
    """The mean over the images of each camera, summed over the cameras of the batch.

    A batch of several processes counts as one: their mean of this value is that of the whole batch.

    Args:
        losses: (B,) of each image.
        cameras: (B,) int64; -1 is a camera like the others.

    Returns:
        Scalar, without the factor 0.5 that ICE puts before it: that is a weight.

    Source: Chen et al. 2021 (ICE), official trainer.
    """
    every = comm.all_gather(cameras, equal=True)
    images = (cameras[:, None] == every).sum(1)
    return (losses / images).sum() * comm.world()


@LOSS_REGISTRY.register()
class CameraProxyLoss(nn.Module):
    """Contrast with camera proxies: the mean over the images of a camera, summed over the cameras of the batch.

    Args:
        temperature, negatives, positives, axis: see `camera_proxy_loss`.

    Raises:
        ValueError: a key out of range.

    Source: Chen et al. 2021 (ICE), official trainer, where the weight is 0.5.
    """

    def __init__(
        self, *, temperature: float = 0.07, negatives: int = 50, positives: str = "all", axis: str = "cosine"
    ) -> None:
        super().__init__()
        check_proxy_keys(temperature, negatives, positives, axis)
        self.temperature, self.negatives, self.positives, self.axis = temperature, negatives, positives, axis

    def forward(self, feats: Tensor, labels: Tensor, cameras: Tensor, proxies: CameraProxies | Proxies) -> Tensor:
        """Scalar; feats (B,D) unit length, labels and cameras (B,)."""
        losses = camera_proxy_loss(
            feats,
            labels,
            cameras,
            proxies,
            temperature=self.temperature,
            negatives=self.negatives,
            positives=self.positives,
            axis=self.axis,
        )
        return sum_over_cameras(losses, cameras)
