"""ACFL-ST: a second network learns with the first one, already trained, at its side."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastreid_uns.errors import InvalidValue, MissingFile
from fastreid_uns.hook import HookBase
from fastreid_uns.modeling.momentum import momentum_copy
from fastreid_uns.modeling.norm import frozen_statistics
from fastreid_uns.modeling.weights import load_weights
from fastreid_uns.registry import HOOK_REGISTRY, META_ARCH_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels
from fastreid_uns.utils.checkpoint import last_checkpoint

from .ascent import check_least
from .model import ACFL

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class ACFLStudent(ACFL):
    """ACFL with a pretrained teacher: a network of the same kind, near whose features those of the queries stay.

    The teacher normalises by the statistics of the batch, learns nothing, and keeps its running statistics. A
    `PretrainedTeacherHook` loads its weights and says in which epochs it also makes the labels; the memory is not
    written in those.

    Args:
        pretrained_weight: mu, of the squared distance between the unit features of student and teacher.

    Raises:
        ValueError: as `ACFL`.

    Source: ACFL, table 9 (ACFL-ST), after Lan et al. 2023 (Learning to Purification), of which the whole image
    counts and the parts are left out; differs: running statistics of the pretrained teacher stay as they were trained.
    """

    def __init__(self, *parts: Any, pretrained_weight: float = 1.0, **keys: Any) -> None:
        super().__init__(*parts, **keys)
        check_least("PRETRAINED_WEIGHT", pretrained_weight)
        self.pretrained_weight = pretrained_weight
        self.pretrained_teacher = momentum_copy(self.encoder)
        self.guided = False
        self._teacher_extracts = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in [key for key in state_dict if key.startswith(f"{prefix}guide.")]:  # its name up to 0.1
            state_dict[key.replace("guide.", "pretrained_teacher.", 1)] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def begin_epoch(self, guided: bool) -> None:
        """Say before the clustering of an epoch whether the pretrained teacher makes its labels."""
        self.guided = self._teacher_extracts = guided

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """`feats` (B,D) of the student, or of the teacher in the clustering of an epoch whose labels it makes."""
        return {"feats": self.pretrained_teacher(images).feats} if self._teacher_extracts else super().extract(images)

    def update_memory(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Take over a new clustering; from here on the student is what `extract` shows."""
        super().update_memory(pseudo, bank)
        self._teacher_extracts = False

    def further_losses(self, queries: Batch, feats: Tensor) -> dict[str, Tensor]:
        """`loss_pretrained`."""
        with torch.no_grad(), frozen_statistics(self.pretrained_teacher):
            wanted = self.pretrained_teacher(queries.views[0]).feats
        return {"loss_pretrained": self.pretrained_weight * (feats - wanted).pow(2).sum(1).mean()}

    def remember(self, feats: Tensor, queries: Batch) -> None:
        """Write the features of the step into the memory, unless the epoch is guided."""
        if not self.guided:
            super().remember(feats, queries)


@HOOK_REGISTRY.register()
class PretrainedTeacherHook(HookBase):
    """Gives an `ACFLStudent` its teacher, whose labels the first epochs use.

    Args:
        weights: what the first stage left: the OUTPUT_DIR of its run, of which the newest checkpoint is taken, or a
            file. Read when training begins; a resumed run has the teacher in its own checkpoint. "" leaves it as the
            student starts, which only tests want.
        epochs: that use the labels of the pretrained teacher.

    Raises:
        ValueError: another model, or weights of another network.
        FileNotFoundError: there are no such weights.

    Source: Lan et al. 2023, official code, where the epoch whose labels it makes is one of twice the iterations.
    """

    order = 5  # before the labels of the epoch, 10

    def __init__(self, *, weights: str = "", epochs: int = 2) -> None:
        if epochs < 0:
            raise InvalidValue(f"PretrainedTeacherHook: EPOCHS is {epochs}; 0 or more is accepted. Raise it.")
        self.weights = weights
        self.epochs = epochs

    def before_train(self) -> None:
        """Load the pretrained teacher, at the start of a run only."""
        model = self.trainer.model
        if not isinstance(model, ACFLStudent):
            raise InvalidValue(
                f"PretrainedTeacherHook: MODEL.NAME is {type(model).__name__}; a model with a pretrained teacher is "
                f"needed. Set it to ACFLStudent, or drop HOOKS.{self.name}."
            )
        if self.trainer.epochs_done:
            return
        if not self.weights:
            logger.warning(
                "HOOKS.%s.WEIGHTS is empty, so the pretrained teacher is no trained network. Name its run.", self.name
            )
            return
        report = load_weights(model.pretrained_teacher, str(self._file()))
        lacking = [*report.missing, *report.mismatched]
        if lacking:
            raise InvalidValue(
                f"HOOKS.{self.name}.WEIGHTS {self.weights}: {len(lacking)} tensors of the teacher are not in it, the "
                f"first is {lacking[0]}; the teacher has the MODEL.BACKBONE and MODEL.HEAD of the student. Train the "
                f"first stage with those of this config."
            )

    def before_epoch(self) -> None:
        """Tell the model whose labels come next."""
        self.trainer.model.begin_epoch(self.trainer.epoch < self.epochs)  # type: ignore[operator]

    def _file(self) -> Path:
        path = Path(self.weights)
        if path.is_dir():
            return last_checkpoint(path)
        if not path.is_file():
            raise MissingFile(
                f"HOOKS.{self.name}.WEIGHTS: {self.weights} is neither a run nor a file of weights. Train "
                f"the first stage (the config whose name ends in _st_teacher), or name its OUTPUT_DIR."
            )
        return path
