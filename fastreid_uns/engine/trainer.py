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
from fastreid_uns.modeling.losses import at_least_float32
from fastreid_uns.modeling.memory import moved_once
from fastreid_uns.modeling.meta_arch import MetaArch
from fastreid_uns.structures import Batch, Moment
from fastreid_uns.utils import comm
from fastreid_uns.utils.progress import progress

logger = logging.getLogger(__name__)


class BatchSource(Protocol):
    """What a trainer needs of a loader."""

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch."""

    def __len__(self) -> int:
        """Batches of the epoch that was planned last; asked for if the trainer has no number of its own."""


class Trainer:
    """Trains a model for `epochs` x `iters_per_epoch` optimiser steps, calling its hooks in order.

    Args:
        model: on its device already.
        train_loader: gives the batches of an epoch.
        optimizer: over the parameters of `model`.
        epochs: clustering rounds.
        iters_per_epoch: batches that the loader gives in each; 0 = as many as it plans.
        hooks: see `HookBase`.
        amp: dtype of mixed precision, None for float32; float16 brings a gradient scaler.
        clip: largest gradient norm, None for no clipping.
        accumulate: parts into which a batch is cut to save memory, see `Trainer.step`.
        channels_last: memory format of the images; the model must have it too.
        find_unused: passed to DistributedDataParallel.

    Attributes:
        epoch: the current epoch, from 0.
        iter: optimiser steps done in the whole run.
        batch_size: images of this process in the latest step.
        epoch_began: moment at which this epoch began, by `time.perf_counter`.
        last: outputs of the latest step, detached, still on the device; of a batch in parts their mean.
        metrics: numbers of this epoch, which hooks write and the log hook reads; cleared when an epoch begins.
        history: `epoch`, `iter` and metrics of each epoch that is done.
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
        self.history: list[dict[str, float]] = []
        self.stop_reason: str | None = None
        self._first_bad = torch.full((), -1, device=self.device)
        self._parallel = comm.wrap(model, self.device, find_unused)
        self._logged: dict[str, tuple[float | Tensor, int]] = {}
        self._hooks: list[HookBase] = []
        self.register_hooks(hooks)

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

    def register_hooks(self, hooks: Iterable[HookBase | None]) -> None:
        """Insert several hooks; None is passed over.

        Raises:
            ValueError: two hooks have the same name.
        """
        for hook in hooks:
            if hook is not None:
                self.add_hook(hook)

    def log(self, **values: float | Tensor) -> None:
        """Add scalars of this moment to the averages of the epoch, as the losses are; the host does not wait.

        Args:
            values: numbers, or tensors of one element, which may be on the device.

        Raises:
            ValueError: a tensor has several elements.
        """
        for name, value in values.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise InvalidValue(f"trainer.log: {name} has shape {tuple(value.shape)}; log a scalar.")
                value = value.detach().float().reshape(())
            total, count = self._logged.get(name, (0.0, 0))
            self._logged[name] = (total + value, count + 1)

    def logged(self) -> dict[str, float]:
        """Averages of what was logged in this epoch, over all calls and over the ranks that logged it."""
        own = {name: float(total) / count for name, (total, count) in self._logged.items()}
        every = comm.gather_objects(own)
        names = sorted({name for numbers in every for name in numbers})
        held = {name: [numbers[name] for numbers in every if name in numbers] for name in names}
        return {name: sum(values) / len(values) for name, values in held.items()}

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
                self._logged = {}
                self.epoch_began = time.perf_counter()
                self.model.moment = Moment(self.epoch, self.iter, self.epoch / self.epochs)
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
        steps = self.iters_per_epoch or len(self.train_loader)
        for number, batch in enumerate(progress(self.train_loader.epoch(self.epoch), f"epoch {self.epoch}", steps)):
            share = (self.epoch * steps + number) / (self.epochs * steps)
            self.model.moment = Moment(self.epoch, self.iter, share)
            self.batch_size = len(batch.index)
            comm.report(self.iter, f"training of epoch {self.epoch}")
            self._call("before_step")
            self.step(batch)
            self.iter += 1
            self._call("after_step")
        self.check_finite()

    def step(self, batch: Batch) -> None:
        """One optimiser step: forward, sum of `loss*`, backward, clip, update.

        In parts, the loss is the mean of theirs and memories move once, after the last one, as with the whole batch.
        What looks at the images of a batch together sees those of a part: batch norm, unless `MODEL.GHOST_BATCH`
        divides a part, and losses that compare the images of a batch with each other.
        """
        parts = _split(batch, self.accumulate)
        with moved_once(self.model) if len(parts) > 1 else contextlib.nullcontext():
            outputs = [self._backward(part, number + 1 == len(parts)) for number, part in enumerate(parts)]
        self.last = outputs[0] if len(parts) == 1 else _mean(outputs)
        good = torch.isfinite(self.last["loss"]) | (self._first_bad >= 0)
        self._first_bad = torch.where(good, self._first_bad, self.iter)
        self._call("after_backward")
        if self.clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """The outputs of a part, detached; the processes average their gradients once, with the last part."""
        if self.channels_last:
            views = tuple(view.contiguous(memory_format=torch.channels_last) for view in batch.views)
            batch = batch._replace(views=views)
        alone = last or self._parallel is self.model
        with contextlib.nullcontext() if alone else self._parallel.no_sync():  # type: ignore[operator]
            outputs, loss = self._forward(batch)
            self.scaler.scale(loss / self.accumulate).backward()
        return {"loss": loss.detach(), **{name: value.detach() for name, value in outputs.items()}}

    def _forward(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            outputs = self._parallel(batch)
            losses = [value for name, value in outputs.items() if name.startswith("loss")]
            if not losses:
                raise InvalidState(
                    f"{type(self.model).__name__}.forward returned {', '.join(outputs) or 'nothing'}; at least one "
                    f"key must begin with 'loss'. Name a loss in MODEL.LOSSES."
                )
            return outputs, torch.stack([at_least_float32(value) for value in losses]).sum()

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
        comm.report(self.iter, f"{stage} of epoch {self.epoch}")
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
            "amp": str(self.amp or "none").removeprefix("torch."),
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
    """The batch cut along its rows, which stay in order; each part holds its share of every domain."""
    if parts == 1:
        return [batch]
    rows: list[list[int]] = [[] for _ in range(parts)]
    domains = batch.domains.tolist()
    for domain in dict.fromkeys(domains):
        own = [row for row, of in enumerate(domains) if of == domain]
        size, rest = divmod(len(own), parts)
        if rest:
            images = f"{len(own)} images" if len(own) == len(domains) else f"{len(own)} images of domain {domain}"
            raise InvalidValue(
                f"SOLVER.ACCUMULATE {parts} does not divide the {images} of a process. Choose a divisor."
            )
        for number in range(parts):
            rows[number] += own[number * size : (number + 1) * size]
    return [_rows(batch, sorted(own)) for own in rows]


def _rows(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, in order, none of them twice."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return batch.rows(slice(rows[0], rows[-1] + 1))
    return batch.rows(torch.tensor(rows))._replace(most=batch.most)


def _mean(outputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each scalar over the parts of a batch; of other outputs the rows of all parts."""
    together = {name: torch.stack([part[name] for part in outputs]) for name in outputs[0]}
    return {
        name: at_least_float32(value).mean(0) if value[0].numel() == 1 else value.flatten(0, 1)
        for name, value in together.items()
    }
