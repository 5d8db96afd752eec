"""What a paper's model is to the trainer, and the model of Cluster Contrast."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.depthwise import float32_gradients_of_depthwise
from fastreid_uns.modeling.encoder import Encoder, build_encoder
from fastreid_uns.modeling.losses import LossSet
from fastreid_uns.modeling.memory import Memory
from fastreid_uns.modeling.momentum import check_buffer_policy, momentum_copy, update_momentum
from fastreid_uns.modeling.norm import domain_batch_norm, freeze_norm_statistics, ghost_batch_norm
from fastreid_uns.modeling.weights import load_weights
from fastreid_uns.registry import BACKBONE_REGISTRY, LOSS_REGISTRY, MEMORY_REGISTRY, META_ARCH_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, HeadOutput, Moment, PseudoLabels
from fastreid_uns.utils.transfer import to_device

logger = logging.getLogger(__name__)


class MetaArch(nn.Module):
    """The whole model of a method: encoders, memory and losses.

    Args:
        encoder: images → features.
        memory: None if the method keeps none.
        losses: the losses that the config names.
        num_images: N, unlabelled training images; what a classifier of fixed capacity or a per-image score needs.
        momentum_encoder: keep a momentum copy of the encoder; it is then what clusters, evaluates and is deployed.
        encoder_momentum: weight of the old value in the update of that copy, in [0, 1].
        momentum_buffers: its norm statistics: `own`, `copy` or `average`, see `momentum.update_momentum`.

    Raises:
        ValueError: `encoder_momentum` is no fraction.
    """

    def __init__(
        self,
        encoder: Encoder,
        memory: Memory | None,
        losses: LossSet,
        num_images: int,
        *,
        momentum_encoder: bool = False,
        encoder_momentum: float = 0.999,
        momentum_buffers: str = "own",
    ) -> None:
        super().__init__()
        if not 0 <= encoder_momentum <= 1:
            raise InvalidValue(
                f"MODEL.ENCODER_MOMENTUM is {encoder_momentum}; a number from 0 to 1 is accepted, the weight of the "
                f"old value. Change it."
            )
        self.encoder = encoder
        self.memory = memory
        self.losses = losses
        self.num_images = num_images
        self.teacher: Encoder | None = momentum_copy(encoder) if momentum_encoder else None
        self.encoder_momentum = encoder_momentum
        check_buffer_policy(momentum_buffers)
        self.momentum_buffers = momentum_buffers

    @property
    def moment(self) -> Moment:
        """Where in the run this is; the trainer sets it before each clustering and before each step."""
        return self.losses.moment

    @moment.setter
    def moment(self, moment: Moment) -> None:
        self.losses.moment = moment

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Training outputs: keys that begin with `loss` are summed, the rest is logged."""
        raise NotImplementedError

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """Evaluation outputs of B images; `feats` (B,D) is required, others become `FeatureBank.extras`.

        Args:
            images: (B,3,H,W) uint8, or float in 0..1.
        """
        return {"feats": self.deploy(images).feats}

    def update_memory(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Take over a new clustering; the memory is reset."""
        if self.memory is not None:
            self.memory.reset(pseudo, bank)

    @torch.no_grad()
    def update_momentum(self, momentum: float) -> None:
        """Move the momentum encoder; the trainer's hook calls it after each step."""
        if self.teacher is not None:
            update_momentum(self.teacher, self.encoder, momentum, self.momentum_buffers)

    def memory_bank(self) -> Tensor | None:
        """(N,D) to cluster instead of fresh features, or None to extract."""
        return None

    @property
    def deploy(self) -> Encoder:
        """The encoder that is evaluated, exported and used."""
        return self.encoder if self.teacher is None else self.teacher


@META_ARCH_REGISTRY.register()
class Baseline(MetaArch):
    """Cluster Contrast: features of the first view against the memory; further losses come from the config.

    Loss inputs: `feats, pooled, labels, index, cameras, domains`; what else the head gives (`unnormalized`, and of a
    part head `parts` and `unnormalized_parts`); with a memory `logits`; with a momentum encoder `teacher_feats` of the
    last view (and `teacher_logits`).

    Source: Dai et al. 2022 (Cluster Contrast), eq. 4.
    """

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_<name>` for each configured loss, and `accuracy` of the memory's nearest row."""
        inputs = self.loss_inputs(batch)
        outputs = self.losses(inputs)
        if "logits" in inputs:
            outputs["accuracy"] = (inputs["logits"].detach().argmax(1) == inputs["labels"]).float().mean()
        return outputs

    def loss_inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Every tensor that a loss can ask for, by name; in training the memory is updated."""
        out: HeadOutput = self.encoder(batch.views[0], batch.domains)
        inputs = named_loss_inputs(out, batch)
        if self.teacher is not None:
            with torch.no_grad():
                inputs["teacher_feats"] = self.teacher(batch.views[-1], batch.domains).feats
        if self.memory is not None:
            rows = self.memory.rows(batch)
            if self.teacher is not None:
                inputs["teacher_logits"] = inputs["teacher_feats"] @ self.memory.features.T / self.memory.temperature
            inputs |= self.contrast(out.feats, rows, batch.most)
            inputs["labels"] = rows
        return inputs

    def contrast(self, feats: Tensor, rows: Tensor, most: int | None) -> dict[str, Tensor]:
        """What the memory has to say of a batch: `logits` (B,rows); in training it moves.

        Args:
            feats: (B,D) unit length.
            rows: (B,) row of each image.
            most: see `Batch.most`.
        """
        return {"logits": self.memory(feats, rows, most)}  # type: ignore[misc]


def check_domains(cfg: Any) -> None:
    """Refuse norm layers for each domain where they cannot be, before anything is read or fetched.

    Raises:
        InvalidValue: `MODEL.DOMAIN_BN` without `DATASETS.SOURCES`, or together with `MODEL.FREEZE_NORM`.
    """
    if cfg.MODEL.DOMAIN_BN and cfg.MODEL.FREEZE_NORM:
        raise InvalidValue(
            "MODEL.DOMAIN_BN and MODEL.FREEZE_NORM are both true; the first gathers statistics of each domain, the "
            "second keeps those of MODEL.WEIGHTS. Set one of them to false."
        )
    if cfg.MODEL.DOMAIN_BN and not cfg.DATASETS.SOURCES:
        raise InvalidValue(
            "MODEL.DOMAIN_BN is true but DATASETS.SOURCES names no set; a labelled source is needed beside the "
            "unlabelled images. Name one, or set MODEL.DOMAIN_BN to false."
        )


def named_loss_inputs(out: HeadOutput, batch: Batch) -> dict[str, Tensor]:
    """What the output of a head and a batch inputs to losses, on the device: all but the views."""
    return {
        **{name: value for name, value in out._asdict().items() if value is not None},
        "index": batch.index,
        "labels": batch.labels,
        "cameras": batch.cameras,
        "domains": to_device(batch.domains, batch.index.device),
    }


def warn_of_other_input(cfg: Any) -> None:
    """Log a warning for each key of `INPUT` that is not what the published weights of the backbone expect.

    A file may hold other weights of the same network; then it is for the user to know what it expects.
    """
    kind = BACKBONE_REGISTRY.get(cfg.MODEL.BACKBONE.NAME)
    if not cfg.MODEL.WEIGHTS or not hasattr(kind, "pretrained_input"):
        return
    wanted = kind.pretrained_input(cfg.MODEL.BACKBONE)
    for key in ("MEAN", "STD"):
        if not np.allclose(cfg.INPUT[key], wanted[key], atol=0.005):
            logger.warning(
                "INPUT.%s is %s, the published weights of MODEL.BACKBONE were made with %s; MODEL.WEIGHTS is %s. "
                "Change INPUT.%s unless those weights are others.",
                *(key, list(cfg.INPUT[key]), wanted[key], cfg.MODEL.WEIGHTS, key),
            )


def build_model(cfg: Any, num_images: int) -> MetaArch:
    """The model of a config, with its starting weights, on the CPU.

    Args:
        cfg: a complete config.
        num_images: N, unlabelled training images.
    """
    check_domains(cfg)
    encoder = build_encoder(cfg)
    if cfg.MODEL.WEIGHTS:
        warn_of_other_input(cfg)
        load_weights(encoder, cfg.MODEL.WEIGHTS, head=cfg.MODEL.WEIGHTS_HEAD)
    encoder.backbone = float32_gradients_of_depthwise(encoder.backbone)
    if cfg.MODEL.FREEZE_NORM:
        encoder.backbone = freeze_norm_statistics(encoder.backbone)
    if cfg.MODEL.DOMAIN_BN:
        domain_batch_norm(encoder, 1 + len(cfg.DATASETS.SOURCES))
    ghost_batch_norm(encoder, cfg.MODEL.GHOST_BATCH)
    memory = MEMORY_REGISTRY.build(cfg.MODEL.MEMORY, encoder.dim) if cfg.MODEL.MEMORY.NAME else None
    losses = LossSet(
        {name: (LOSS_REGISTRY.build(section), section.WEIGHT) for name, section in cfg.MODEL.LOSSES.items()},
        {name: section.START_EPOCH for name, section in cfg.MODEL.LOSSES.items()},
    )
    return META_ARCH_REGISTRY.build(cfg.MODEL, encoder, memory, losses, num_images)
