"""Two networks and their averages: each learns from the labels of the clustering and from the other one's average."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue, MissingFile
from fastreid_uns.hook import HookBase
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.meta_arch import MetaArch, named_loss_inputs
from fastreid_uns.modeling.momentum import momentum_copy, update_momentum
from fastreid_uns.modeling.weights import load_weights
from fastreid_uns.registry import HOOK_REGISTRY, META_ARCH_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, HeadOutput, PseudoLabels
from fastreid_uns.utils.checkpoint import last_checkpoint

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class MutualModel(MetaArch):
    """Networks 1 and 2 with classifiers, and an average over time of each.

    The losses of the config count for each network; the first view of a batch is shown to network 1 and its average,
    the last one to network 2 and its average. Of a network they are offered `feats`, `pooled`, `unnormalized`, `logits`
    (B,K), `labels`, `index`, `cameras`, `domains`, and of the average of the *other* network `teacher_feats`,
    `teacher_pooled` and `teacher_logits`.

    After each clustering the first K rows of the four classifiers are set to its centroids. The average of network 1 is
    evaluated and deployed; for the clustering `extract` gives the features of both.

    Args:
        capacity: rows of each classifier, the most clusters that there may be; never more than training images.
        keys: those of `MetaArch`; `momentum_encoder` is always true.

    Raises:
        ValueError: a parameter out of range, no momentum encoder, or a memory; in `update_memory`, more clusters than
            rows, or labelled sources.

    Source: Ge et al. 2020 (MMT), section 3.2.
    """

    teacher: Encoder
    teacher_classifiers: Tensor

    def __init__(self, *parts: Any, capacity: int = 3000, momentum_encoder: bool = True, **keys: Any) -> None:
        super().__init__(*parts, momentum_encoder=True, **keys)
        if not momentum_encoder:
            raise InvalidValue(
                "MODEL.MOMENTUM_ENCODER is false; MutualModel learns from the averages of its networks. Set it to true."
            )
        if self.memory is not None:
            raise InvalidValue("MutualModel: it trains classifiers and reads no memory. Set MODEL.MEMORY to null.")
        if capacity < 1:
            raise InvalidValue(f"MutualModel: MODEL.CAPACITY is {capacity}; 1 or more rows are accepted. Change it.")
        self.capacity = min(capacity, self.num_images)
        self.clusters = 0
        self.encoder_2 = copy.deepcopy(self.encoder)
        self.teacher_2 = momentum_copy(self.encoder_2)
        self.classifiers = nn.Parameter(torch.zeros(2, self.capacity, self.encoder.dim))
        self.register_buffer("teacher_classifiers", torch.zeros(2, self.capacity, self.encoder.dim))

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """`feats` (B,D) of the average of network 1, and for the clustering `peer_feats` (B,D) of the other one."""
        return {"feats": self.teacher(images).feats, "peer_feats": self.teacher_2(images).feats}

    @torch.no_grad()
    def update_memory(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Aim the classifiers at the clusters."""
        if bank.source_feats is not None:
            raise InvalidValue(
                "MutualModel: DATASETS.SOURCES names labelled sets; they are read by SourceModel, before. Drop them."
            )
        if pseudo.num_clusters > self.capacity:
            raise InvalidValue(
                f"MutualModel: {pseudo.num_clusters:,} clusters for classifiers of {self.capacity:,} rows. Raise "
                f"MODEL.CAPACITY, or lower PSEUDO_LABELS.NUM_CLUSTERS."
            )
        self.clusters = pseudo.num_clusters
        for rows in (self.classifiers, self.teacher_classifiers):
            rows[:, : self.clusters] = pseudo.centroids.to(rows)

    @torch.no_grad()
    def update_momentum(self, momentum: float) -> None:
        """Move the averages; in the first steps of the run they are means of all steps, so the first one copies."""
        momentum = min(1.0 - 1.0 / (self.moment.step + 1), momentum)
        update_momentum(self.teacher, self.encoder, momentum, self.momentum_buffers)
        update_momentum(self.teacher_2, self.encoder_2, momentum, self.momentum_buffers)
        self.teacher_classifiers.lerp_(self.classifiers, 1.0 - momentum)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_<name>_1` and `loss_<name>_2` for each configured loss, and the mean `accuracy` of both networks."""
        students = self._outputs((self.encoder, self.encoder_2), self.classifiers, batch)
        with torch.no_grad():
            teachers = self._outputs((self.teacher, self.teacher_2), self.teacher_classifiers, batch)
        outputs, right = {}, []
        for number, (out, logits), peer in zip((1, 2), students, reversed(teachers), strict=True):
            inputs = {**named_loss_inputs(out, batch), "logits": logits, **_of_teacher(*peer)}
            outputs |= {f"{name}_{number}": value for name, value in self.losses(inputs).items()}
            right.append(logits.detach().argmax(1) == batch.labels)
        outputs["accuracy"] = torch.stack(right).float().mean()
        return outputs

    def _outputs(
        self, encoders: Sequence[Encoder], classifiers: Tensor, batch: Batch
    ) -> list[tuple[HeadOutput, Tensor]]:
        """Output and logits (B,K) of two networks, each of a view of its own."""
        found = []
        for encoder, rows, view in zip(encoders, classifiers, (batch.views[0], batch.views[-1]), strict=True):
            out = encoder(view, batch.domains)
            with torch.autocast(view.device.type, enabled=False):
                found.append((out, out.unnormalized @ rows[: self.clusters].T))  # type: ignore[operator]
        return found


def _of_teacher(out: HeadOutput, logits: Tensor) -> dict[str, Tensor]:
    return {"teacher_feats": out.feats, "teacher_pooled": out.pooled, "teacher_logits": logits}


@HOOK_REGISTRY.register()
class SecondNetworkHook(HookBase):
    """Gives network 2 of a `MutualModel` and its average weights of their own, when a run begins.

    Equal networks would make equal mistakes: the paper takes two that were trained on the source with different seeds.

    Args:
        weights: the OUTPUT_DIR of a run, of which the newest checkpoint is taken, or what `MODEL.WEIGHTS` takes; "" =
            those of network 1, with a warning, or, where `MODEL.WEIGHTS` is empty, random weights of its own.
        seed: of the random weights, from 0.

    Raises:
        ValueError: another model, or weights of another network.
        FileNotFoundError: there are no such weights.
    """

    order = 5  # before the first clustering, 10

    def __init__(self, *, weights: str = "", seed: int = 2) -> None:
        if seed < 0:
            raise InvalidValue(f"SecondNetworkHook: SEED is {seed}; 0 or more is accepted. Change it.")
        self.weights = weights
        self.seed = seed

    def before_train(self) -> None:
        """Load or draw, unless the run is resumed."""
        model = self.trainer.model
        if not isinstance(model, MutualModel):
            raise InvalidValue(
                f"SecondNetworkHook: MODEL.NAME is {type(model).__name__}, which has one network. Set it to "
                f"MutualModel, or drop HOOKS.{self.name}."
            )
        if self.trainer.epochs_done:
            return
        if self.weights:
            load_weights(model.encoder_2, self._source())
        elif self.trainer.cfg.MODEL.WEIGHTS:  # type: ignore[attr-defined]
            logger.warning(
                "HOOKS.%s.WEIGHTS is empty, so both networks start from MODEL.WEIGHTS and differ by their views alone.",
                self.name,
            )
            return
        else:
            model.encoder_2.load_state_dict(_drawn(model.encoder_2, self.seed).state_dict())
        model.teacher_2.load_state_dict(model.encoder_2.state_dict())

    def _source(self) -> str:
        path = Path(self.weights)
        if path.is_dir():
            return str(last_checkpoint(path))
        if self.weights != "imagenet" and "://" not in self.weights and ":" not in self.weights and not path.is_file():
            raise MissingFile(
                f"HOOKS.{self.name}.WEIGHTS: {self.weights} is neither a run nor a file of weights. Train the config "
                f"whose name ends in _source with another SEED, or name its OUTPUT_DIR."
            )
        return self.weights


def _drawn(encoder: Encoder, seed: int) -> nn.Module:
    """A copy on the CPU whose layers have drawn new weights, each as its class does by default."""
    fresh = copy.deepcopy(encoder).cpu()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in fresh.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()  # type: ignore[operator]
    return fresh
