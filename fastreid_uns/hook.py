"""The base of everything that acts between the steps of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastreid_uns.engine.trainer import Trainer


class HookBase:
    """Called by the trainer at five moments; overrides what it needs.

    Hooks run by ascending `order` (recluster 10, schedule 20, momentum encoder 30, evaluate 50, log 90,
    checkpoint 100), within equal order as they were added. `name` is the key of the hook's state in a checkpoint and
    must be unique in a run; it is the class name unless set.
    """

    order: int = 50
    name: str | None = None
    trainer: Trainer

    def before_train(self) -> None:
        """Once, after a resumed state has been loaded."""

    def before_epoch(self) -> None:
        """Before the batches of an epoch; re-clustering happens here."""

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
