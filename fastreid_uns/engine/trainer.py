"""The one training loop: cluster, step, evaluate, save; whatever else happens is a hook."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.hook import HookBase
from fastreid_uns.modeling.meta_arch import MetaArch
from fastreid_uns.structures import Batch
from fastreid_uns.utils import comm
from fastreid_uns.utils.progress import progress

logger = logging.getLogger(__name__)


class BatchSource(Protocol):
    """What a trainer needs of a loader."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch."""


class Trainer:
    """Trains a model for `epochs` x `iters_per_epoch` optimiser steps, calling its hooks in order.

    Args:
        model: on its device already.
        train_loader: gives the batches of an epoch.
        optimizer: over the parameters of `model`.
        epochs: clustering rounds.
        iters_per_epoch: batches that the loader gives in each.
        hooks: see `HookBase`.
        amp: dtype of mixed precision, None for float32; float16 brings a gradient scaler.
        clip: largest gradient norm, None for no clipping.
        accumulate: parts into which a batch is cut to save memory; rows stay in order.
        channels_last: memory format of the images; the model must have it too.
        find_unused: passed to DistributedDataParallel.

    Attributes:
        epoch: the current epoch, from 0.
        iter: optimiser steps done in the whole run.
        batch_size: images of this process in the latest step.
        epoch_began: moment at which this epoch began, by `time.perf_counter`.
        last: outputs of the latest step, detached, still on the device.
        metrics: numbers of this epoch, which hooks write and the log hook reads; cleared when an epoch begins.
        folder: where the files of the run go, None for nowhere.
    """

    folder: Path | None = None

    def __init__(
        self,
        model: MetaArch,
        train_loader: BatchSource,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        iters_per_epoch: int,
        hooks: Iterable[HookBase] = (),
        amp: torch.dtype | None = None,
        clip: float | None = None,
        accumulate: int = 1,
        channels_last: bool = False,
        find_unused: bool = False,
    ) -> None:
        self.model = model
        self.train_loader = train_loader
        self.optimizer = optimizer
        self.epochs = epochs
        self.iters_per_epoch = iters_per_epoch
        self.amp = amp
        self.clip = clip
        self.accumulate = accumulate
        self.channels_last = channels_last
        self.device = next(model.parameters()).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp is torch.float16)
        self.epoch = 0
        self.iter = 0
        self.batch_size = 0
        self.epochs_done = 0
        self.epoch_began = 0.0
        self.last: dict[str, Tensor] = {}
        self.metrics: dict[str, float] = {}
        self.stop_reason: str | None = None
        self._first_bad = torch.full((), -1, device=self.device)
        self._parallel = comm.wrap(model, self.device, find_unused)
        self._hooks: list[HookBase] = []
        for hook in hooks:
            self.add_hook(hook)

    def add_hook(self, hook: HookBase) -> None:
        """Insert a hook by its order.

        Raises:
            ValueError: another hook has the same name; their states would overwrite each other.
        """
        hook.name = hook.name or type(hook).__name__
        if any(held.name == hook.name for held in self._hooks):
            raise InvalidValue(f"trainer: two hooks are named {hook.name}; set `name` of one of them.")
        hook.trainer = self
        self._hooks.append(hook)
        self._hooks.sort(key=lambda held: held.order)

    def train(self) -> None:
        """Run all epochs that are left.

        Raises:
            RuntimeError: a loss is not finite; the checkpoints of the epochs before are kept.
        """
        try:
            self._call("before_train")
            while self.epochs_done < self.epochs and self.stop_reason is None:
                self.epoch = self.epochs_done
                self.metrics = {}
                self.epoch_began = time.perf_counter()
                self._call("before_epoch")
                with self.timed("train"):
                    self._train_epoch()
                self.epochs_done += 1
                self._call("after_epoch")
            if self.stop_reason is not None:
                logger.info("Stopped after epoch %d: %s", self.epoch, self.stop_reason)
        finally:
            self._call("after_train")

    def _train_epoch(self) -> None:
        self.model.train()
        for batch in progress(self.train_loader.epoch(self.epoch), f"epoch {self.epoch}", self.iters_per_epoch):
            self.batch_size = len(batch.index)
            self.step(batch)
            self.iter += 1
            self._call("after_step")
        self.check_finite()

    def step(self, batch: Batch) -> None:
        """One optimiser step: forward, sum of `loss*`, backward, clip, update."""
        parts = _split(batch, self.accumulate)
        for number, part in enumerate(parts):
            joins = number + 1 == len(parts) or self._parallel is self.model
            # gradients of the processes are averaged once, with the last part
            with contextlib.nullcontext() if joins else self._parallel.no_sync():  # type: ignore[operator]
                self._backward(part, 1.0 / len(parts))
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch, share: float) -> None:
        if self.channels_last:
            views = tuple(view.contiguous(memory_format=torch.channels_last) for view in batch.views)
            batch = batch._replace(views=views)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            outputs = self._parallel(batch)
            losses = [value for name, value in outputs.items() if name.startswith("loss")]
            if not losses:
                raise InvalidState(
                    f"{type(self.model).__name__}.forward returned {', '.join(outputs) or 'nothing'}; at least one "
                    f"key must begin with 'loss'."
                )
            loss = torch.stack([value.float() for value in losses]).sum()
        self.scaler.scale(loss * share).backward()
        self.last = {"loss": loss.detach(), **{name: value.detach() for name, value in outputs.items()}}
        good = torch.isfinite(self.last["loss"]) | (self._first_bad >= 0)
        self._first_bad = torch.where(good, self._first_bad, self.iter)

    def check_finite(self) -> None:
        """Raise if a loss since the start was not finite; the one place where the host waits for the device.

        Raises:
            RuntimeError: with the step, the latest losses and what to try.
        """
        first = int(self._first_bad)
        if first >= 0:
            losses = ", ".join(f"{k} {float(v):.3g}" for k, v in self.last.items() if k.startswith("loss"))
            raise InvalidState(
                f"training: the loss is not finite since step {first} (epoch {self.epoch}; now {losses}). The "
                f"checkpoints of earlier epochs are kept. Lower SOLVER.BASE_LR or set SOLVER.CLIP_NORM."
            )

    def stop(self, reason: str) -> None:
        """End the run after this epoch, with evaluation, checkpoint and log done."""
        self.stop_reason = reason

    @property
    def last_epoch(self) -> bool:
        """Whether no epoch follows this one."""
        return self.epoch + 1 >= self.epochs or self.stop_reason is not None

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the wall time of a block to `metrics["seconds_<stage>"]`."""
        start = time.perf_counter()
        yield
        key = f"seconds_{stage}"
        self.metrics[key] = self.metrics.get(key, 0.0) + time.perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        """All that the next epoch reads, apart from random state: tensors and plain Python values."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "hooks": {hook.name: hook.state_dict() for hook in self._hooks},
            "epochs_done": self.epochs_done,
            "iter": self.iter,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave; hooks that the state does not know start fresh."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for hook in self._hooks:
            if hook.name in state["hooks"]:
                hook.load_state_dict(state["hooks"][hook.name])
        self.epochs_done = state["epochs_done"]
        self.iter = state["iter"]

    def _call(self, moment: str) -> None:
        for hook in self._hooks:
            getattr(hook, moment)()


def _split(batch: Batch, parts: int) -> list[Batch]:
    """The batch cut along its rows, which stay in order."""
    if parts == 1:
        return [batch]
    rows = len(batch.index)
    if rows % parts:
        raise InvalidValue(
            f"SOLVER.ACCUMULATE {parts} does not divide the {rows} images of a process. Choose a divisor."
        )
    share = rows // parts
    return [batch.rows(slice(first, first + share)) for first in range(0, rows, share)]
