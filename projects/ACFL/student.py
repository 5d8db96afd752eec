"""ACFL-ST: a second network learns with the first one, already trained, at its side."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
    """ACFL with a guide: a trained network of the same kind, whose features those of the queries stay near to.

    The guide normalises by the statistics of the batch, learns nothing, and keeps its running statistics. A `GuideHook`
    gives it its weights and says in which epochs it also makes the labels; the memory is not written in those.

    Args:
        guide_weight: mu, of the squared distance between the unit features of student and guide.

    Raises:
        ValueError: as `ACFL`.

    Source: ACFL, table 9 (ACFL-ST), after Lan et al. 2023 (Learning to Purification), of which the whole image
    counts and the parts are left out; differs: running statistics of the guide stay as they were trained.
    """

    def __init__(self, *parts: Any, guide_weight: float = 1.0, **keys: Any) -> None:
        super().__init__(*parts, **keys)
        check_least("GUIDE_WEIGHT", guide_weight)
        self.guide_weight = guide_weight
        self.guide = momentum_copy(self.encoder)
        self.guided = False
        self._guide_extracts = False

    def begin_epoch(self, guided: bool) -> None:
        """Say before the clustering of an epoch whether the guide makes its labels."""
        self.guided = self._guide_extracts = guided

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """`feats` (B,D) of the student; of the guide for the clustering of a guided epoch."""
        return {"feats": self.guide(images).feats} if self._guide_extracts else super().extract(images)

    def refit(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Take over a new clustering; from here on the student is what `extract` shows."""
        super().refit(pseudo, bank)
        self._guide_extracts = False

    def further_losses(self, queries: Batch, feats: Tensor) -> dict[str, Tensor]:
        """`loss_guide`."""
        with torch.no_grad(), frozen_statistics(self.guide):
            wanted = self.guide(queries.views[0]).feats
        return {"loss_guide": self.guide_weight * (feats - wanted).pow(2).sum(1).mean()}

    def remember(self, feats: Tensor, queries: Batch) -> None:
        """Write the features of the step into the memory, unless the epoch is guided."""
        if not self.guided:
            super().remember(feats, queries)


@HOOK_REGISTRY.register()
class GuideHook(HookBase):
    """Gives an `ACFLStudent` its guide, whose labels the first epochs use.

    Args:
        weights: what the first stage left: the OUTPUT_DIR of its run, of which the newest checkpoint is taken, or a
            file. Read when training begins; a resumed run has the guide in its own checkpoint. "" leaves the guide as
            the student starts, which only tests want.
        epochs: that use the labels of the guide.

    Raises:
        ValueError: another model, or weights of another network.
        FileNotFoundError: there are no such weights.

    Source: Lan et al. 2023, official code, where the guided epoch is one of twice the iterations.
    """

    order = 5  # before the labels of the epoch, 10

    def __init__(self, *, weights: str = "", epochs: int = 2) -> None:
        if epochs < 0:
            raise ValueError(f"GuideHook: EPOCHS is {epochs}; 0 or more is accepted. Raise it.")
        self.weights = weights
        self.epochs = epochs

    def before_train(self) -> None:
        """Load the guide, at the start of a run only."""
        model = self.trainer.model
        if not isinstance(model, ACFLStudent):
            raise ValueError(
                f"GuideHook: MODEL.NAME is {type(model).__name__}; a model with a guide is needed. Set it to "
                f"ACFLStudent, or drop HOOKS.{self.name}."
            )
        if self.trainer.epochs_done:
            return
        if not self.weights:
            logger.warning("HOOKS.%s.WEIGHTS is empty, so the guide is no trained network. Name its run.", self.name)
            return
        report = load_weights(model.guide, str(self._file()))
        lacking = [*report.missing, *report.mismatched]
        if lacking:
            raise ValueError(
                f"HOOKS.{self.name}.WEIGHTS {self.weights}: {len(lacking)} tensors of the guide are not in it, the "
                f"first is {lacking[0]}; the guide has the MODEL.BACKBONE and MODEL.HEAD of the student. Train the "
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
            raise FileNotFoundError(
                f"HOOKS.{self.name}.WEIGHTS: {self.weights} is neither a run nor a file of weights. Train "
                f"the first stage (the config whose name ends in _st_teacher), or name its OUTPUT_DIR."
            )
        return path
