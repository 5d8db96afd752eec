"""ACFL-C: the contrast with camera proxies on top; a plugin of its own, named by the configs that use it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.proxies import AXES, POSITIVES, CameraProxies, camera_proxy_loss, sum_over_cameras
from fastreid_uns.registry import META_ARCH_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels

from .ascent import check_least, check_word
from .model import ACFL


@META_ARCH_REGISTRY.register()
class ACFLCamera(ACFL):
    """ACFL and, for each query, the contrast with the proxies of its cluster in all cameras.

    A proxy is the unit-length mean of the images of a cluster in one camera, made at each clustering.

    Args:
        camera_weight: mu, of the contrast; the factor 0.5 of ICE's released code is this one and is not applied again.
        camera_temperature: divides the similarities with proxies, > 0.
        camera_negatives: most similar proxies of other clusters that count.
        camera_positives: `all` proxies of the cluster, the query's own camera included, as in ICE's released code
            of the loss; `other` = those of other cameras, the rule of PPLR.
        camera_axis: `cosine`, or `coordinates`, the normalisation of ICE's released code.

    Raises:
        ValueError: as `ACFL`; in `update_memory`, fewer than two cameras are known.

    Source: ACFL, table 6 (ACFL-C); the contrast: Chen et al. 2021 (ICE).
    """

    def __init__(
        self,
        *parts: Any,
        camera_weight: float = 0.5,
        camera_temperature: float = 0.07,
        camera_negatives: int = 50,
        camera_positives: str = "all",
        camera_axis: str = "cosine",
        **keys: Any,
    ) -> None:
        super().__init__(*parts, **keys)
        check_least("CAMERA_WEIGHT", camera_weight)
        check_word("CAMERA_POSITIVES", camera_positives, POSITIVES)
        check_word("CAMERA_AXIS", camera_axis, AXES)
        check_least("CAMERA_NEGATIVES", camera_negatives, 1)
        if camera_temperature <= 0:
            raise InvalidValue(
                f"MODEL.CAMERA_TEMPERATURE is {camera_temperature}; a number above 0 is accepted. Raise it."
            )
        self.proxies = CameraProxies(self.encoder.dim)
        self.camera_weight = camera_weight
        self.camera_keys: dict[str, Any] = {"temperature": camera_temperature, "negatives": camera_negatives}
        self.camera_keys |= {"positives": camera_positives, "axis": camera_axis}

    def update_memory(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Take over a new clustering; the proxies are made anew as well."""
        super().update_memory(pseudo, bank)
        self.proxies.reset(bank.feats, pseudo.labels, bank.cameras)

    def further_losses(self, queries: Batch, feats: Tensor) -> dict[str, Tensor]:
        """`loss_camera`."""
        losses = camera_proxy_loss(feats, queries.labels, queries.cameras, self.proxies, **self.camera_keys)
        return {"loss_camera": self.camera_weight * sum_over_cameras(losses, queries.cameras)}
