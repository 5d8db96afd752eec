"""The base of everything that acts between the steps of training, and what it may use of the trainer."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class TrainerView(Protocol):
    """What a hook may use of the trainer, see `engine.trainer.Trainer`; a `DefaultTrainer` has more."""

    model: Any
    optimizer: torch.optim.Optimizer
    device: torch.device
    amp: torch.dtype | None
    epochs: int
    iters_per_epoch: int
    epoch: int
    iter: int
    epochs_done: int
    batch_size: int
    epoch_began: float
    last: dict[str, Tensor]
    metrics: dict[str, float]
    history: list[dict[str, float]]
    folder: Path | None

    @property
    def last_epoch(self) -> bool:
        """Whether no epoch follows this one."""

    def log(self, **values: float | Tensor) -> None:
        """Add scalars to the averages of this epoch."""

    def logged(self) -> dict[str, float]:
        """Averages of what was logged in this epoch."""

    def stop(self, reason: str) -> None:
        """End the run after this epoch."""

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Add the wall time of a block to the metrics."""

    def check_finite(self) -> None:
        """Raise if a loss was not finite."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch reads."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class HookBase:
    """Called by the trainer at seven moments; overrides what it needs.

    Hooks run by ascending `order` (recluster 10, schedule 20, momentum encoder 30, evaluate 50, log 90,
    checkpoint 100), within equal order as they were added. `name` is the key of the hook's state in a checkpoint and
    must be unique in a run; it is the class name unless set. `trainer.log(name=value)` at any moment adds a scalar to
    the averages of the epoch.
    """

    order: int = 50
    name: str | None = None
    trainer: TrainerView

    def before_train(self) -> None:
        """Once, after a resumed state has been loaded."""

    def before_epoch(self) -> None:
        """Before the batches of an epoch; re-clustering happens here."""

    def before_step(self) -> None:
        """Before each optimiser step, when its batch has been read."""

    def after_backward(self) -> None:
        """When the gradients of the whole batch are there, before they are clipped and used."""

    def after_step(self) -> None:
        """After each optimiser step; `trainer.last` holds the outputs of the model, still on the device."""

    def after_epoch(self) -> None:
        """After the batches of an epoch; `trainer.epoch` still counts the epoch that ends."""

    def after_train(self) -> None:
        """Once, also when training was stopped early or failed."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: tensors and plain Python values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
