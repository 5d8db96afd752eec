"""Global and part branches with classifiers that are re-aimed at the clusters of each epoch."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.meta_arch import Baseline
from fastreid_uns.modeling.proxies import CameraProxies, camera_proxy_loss
from fastreid_uns.pseudo_labels.base import centroids
from fastreid_uns.registry import META_ARCH_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels
from fastreid_uns.utils import comm

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class PPLR(Baseline):
    """A classifier for the whole image and one for each part; what they are taught is for the losses to say.

    Beside what `Baseline` offers, losses are offered `logits` (B,K) and `part_logits` (B,P,K), products of the features
    before unit length with the rows of the classifiers, and `agreement` (B,P) of the latest clustering.

    The classifiers have a fixed number of rows, of which the first K are in use: they are set to the unit means of the
    clusters after each clustering and then trained. Moments of the optimiser stay with their rows.

    Args:
        capacity: rows of each classifier, the most clusters that there may be; never more than training images.
        camera_weight: of the contrast with the camera proxies, whole image plus mean of the parts; 0 = camera labels
            are not read.
        camera_temperature: divides the similarities to the proxies, > 0.
        camera_negatives: most similar proxies of other clusters that are contrasted with.
        keys: those of `Baseline`.

    Raises:
        ValueError: a parameter out of range, a head without parts, or a memory; in `update_memory`, more clusters than
            rows, labels without agreement, labelled sources, or camera proxies without camera labels.

    Source: Cho et al. 2022 (PPLR), section 3.
    """

    agreement: Tensor

    def __init__(
        self,
        *parts: Any,
        capacity: int = 3000,
        camera_weight: float = 0.0,
        camera_temperature: float = 0.07,
        camera_negatives: int = 50,
        **keys: Any,
    ) -> None:
        super().__init__(*parts, **keys)
        self.parts = len(getattr(self.encoder.head, "part_embed", ()))
        _check_options(self, capacity, camera_weight, camera_temperature, camera_negatives)
        self.camera_weight = camera_weight
        self.camera_temperature = camera_temperature
        self.camera_negatives = camera_negatives
        self.capacity = min(capacity, self.num_images)
        self.clusters = 0
        self.classifiers = nn.Parameter(torch.zeros(1 + self.parts, self.capacity, self.encoder.dim))
        self.register_buffer("agreement", torch.zeros(self.num_images, self.parts))
        branches = 1 + self.parts if camera_weight else 0
        self.proxies = nn.ModuleList(CameraProxies(self.encoder.dim) for _ in range(branches))

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """`feats` (B,D), and for the clustering `parts` (B,P,D)."""
        out = self.deploy(images)
        return {"feats": out.feats, "parts": out.parts}

    @torch.no_grad()
    def update_memory(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Aim the classifiers at the clusters, make the camera proxies anew, keep the agreement."""
        if bank.source_feats is not None:
            raise InvalidValue("PPLR: labelled sources were found, but its classifiers know clusters only. Drop them.")
        if "agreement" not in pseudo.extras:
            raise InvalidValue(
                f"PPLR: the labels hold {', '.join(pseudo.extras) or 'nothing'} beside the clusters; the agreement of "
                f"each part is needed. Set PSEUDO_LABELS.NAME to AgreementLabels."
            )
        if pseudo.num_clusters > self.capacity:
            raise InvalidValue(
                f"PPLR: {pseudo.num_clusters:,} clusters for classifiers of {self.capacity:,} rows; each cluster needs "
                f"a row. Raise MODEL.CAPACITY, or raise PSEUDO_LABELS.EPS for fewer clusters."
            )
        branches = [bank.feats, *bank.extras["parts"].unbind(1)]
        rows = torch.stack([centroids(feats, pseudo.labels) for feats in branches])
        # sums on CUDA differ in the last bit from process to process, parameters must not
        rows = comm.broadcast_object(rows.cpu()).to(self.classifiers.device)
        self.clusters = pseudo.num_clusters
        self.classifiers[:, : self.clusters] = rows
        self.agreement = pseudo.extras["agreement"].to(self.agreement.device)
        for proxies, feats in zip(self.proxies, branches, strict=False):
            proxies.reset(feats, pseudo.labels, bank.cameras)  # type: ignore[operator]
        if self.proxies and len(self.proxies[0].labels.unique()) == len(self.proxies[0].labels):
            logger.warning(
                "PPLR: no cluster is seen by two cameras, so the camera loss is 0 in this epoch; if it stays so, set "
                "MODEL.CAMERA_WEIGHT 0."
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_<name>` for each configured loss, `loss_camera` if it has a weight, and `accuracy`."""
        inputs = self.loss_inputs(batch)
        outputs = self.losses(inputs)
        if self.camera_weight:
            outputs["loss_camera"] = self.camera_weight * self._camera_loss(inputs)
        outputs["accuracy"] = (inputs["logits"].detach().argmax(1) == batch.labels).float().mean()
        outputs["agreement"] = inputs["agreement"].mean()
        return outputs

    def loss_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """See the class."""
        inputs = super().loss_inputs(batch)
        unnormalized = torch.cat([inputs["unnormalized"][:, None], inputs["unnormalized_parts"]], dim=1)
        with torch.autocast(unnormalized.device.type, enabled=False):
            logits = torch.einsum("bpd,pkd->bpk", unnormalized, self.classifiers[:, : self.clusters])
        inputs |= {"logits": logits[:, 0], "part_logits": logits[:, 1:]}
        inputs["agreement"] = self.agreement[batch.index]
        return inputs

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}clusterings", None)  # of checkpoints that counted epochs themselves
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _camera_loss(self, inputs: dict[str, Tensor]) -> Tensor:
        """Contrast with the camera proxies: that of the whole image and the mean of those of the parts.

        Source: Cho et al. 2022 (PPLR), camera-aware variant, with the inter-camera loss of Wang et al. 2021 (CAP).
        """
        losses = [
            camera_proxy_loss(
                feats,
                inputs["labels"],
                inputs["cameras"],
                proxies,
                temperature=self.camera_temperature,
                negatives=self.camera_negatives,
                positives="other",
            ).mean()
            for feats, proxies in zip([inputs["feats"], *inputs["parts"].unbind(1)], self.proxies, strict=True)
        ]
        return losses[0] + torch.stack(losses[1:]).mean()


def _check_options(model: PPLR, capacity: int, weight: float, temperature: float, negatives: int) -> None:
    if not model.parts:
        raise InvalidValue(
            f"PPLR: MODEL.HEAD.NAME {type(model.encoder.head).__name__} gives no parts, which refine the labels. Set "
            f"MODEL.HEAD.NAME to PartHead."
        )
    if model.memory is not None:
        raise InvalidValue("PPLR: it trains classifiers and reads no memory. Set MODEL.MEMORY to null.")
    for key, value, good, accepted in (
        ("CAPACITY", capacity, capacity >= 1, "1 or more rows are"),
        ("CAMERA_WEIGHT", weight, weight >= 0, "0 (off) or more is"),
        ("CAMERA_TEMPERATURE", temperature, temperature > 0, "a number above 0 is"),
        ("CAMERA_NEGATIVES", negatives, negatives >= 1, "1 or more are"),
    ):
        if not good:
            raise InvalidValue(f"PPLR: MODEL.{key} is {value}; {accepted} accepted. Change it.")
