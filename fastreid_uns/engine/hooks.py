"""What happens around the steps, in this order: re-cluster, schedule, momentum encoder, evaluate, log, checkpoint.

The checkpoint comes last, so it holds all that the other hooks know after the epoch, and the numbers of all epochs. A
run that is killed at any moment goes on from its newest checkpoint; what was written of later epochs is dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from fastreid_uns.config import refuse_other_config
from fastreid_uns.engine.log import Writer
from fastreid_uns.errors import InvalidValue
from fastreid_uns.evaluation.evaluator import Evaluator
from fastreid_uns.hook import HookBase
from fastreid_uns.utils import checkpoint, comm
from fastreid_uns.utils.seed import random_state, set_random_state

logger = logging.getLogger(__name__)


class ResetStateHook(HookBase):
    """Makes the optimiser forget its moments at each clustering: labels of the epoch before have other numbers."""

    order = 12

    def before_epoch(self) -> None:
        """Forget."""
        self.trainer.optimizer.state.clear()


class ScheduleHook(HookBase):
    """Steps the learning rate after every optimiser step.

    Args:
        schedule: a factor for each step, or for each epoch.
        by_epoch: step after each epoch instead.
    """

    order = 20

    def __init__(self, schedule: torch.optim.lr_scheduler.LRScheduler, *, by_epoch: bool = False) -> None:
        self.schedule = schedule
        self.by_epoch = by_epoch

    def after_step(self) -> None:
        """Step."""
        if not self.by_epoch:
            self.schedule.step()

    def after_epoch(self) -> None:
        """Step, if it is by epoch."""
        if self.by_epoch:
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Position in the schedule."""
        return {"last_epoch": self.schedule.last_epoch, "last_lr": self.schedule.get_last_lr()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it; the rate of the next step is that of the present schedule, which may be a longer one."""
        schedule = self.schedule
        schedule.last_epoch, schedule._last_lr = state["last_epoch"], state["last_lr"]
        if isinstance(schedule, LambdaLR):
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
            for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate


class MomentumEncoderHook(HookBase):
    """Moves the momentum encoder after every step.

    Args:
        momentum: weight of the old value, in [0, 1].
    """

    order = 30

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum

    def after_step(self) -> None:
        """Move."""
        self.trainer.model.update_momentum(self.momentum)


class EvaluateHook(HookBase):
    """Evaluates every `period` epochs and after the last one, into the metrics of the epoch.

    Args:
        evaluators: name of a test set → its evaluator; the first one decides which epoch is best.
        period: epochs; 0 = only after the last.
        patience: evaluations without a better mAP after which training stops; 0 = never.
    """

    order = 50

    def __init__(self, evaluators: Mapping[str, Evaluator], *, period: int = 0, patience: int = 0) -> None:
        self.evaluators = evaluators
        self.period = period
        self.patience = patience
        self.best = -1.0
        self.waited = 0
        self.improved = False
        self.results: dict[str, dict[str, float]] = {}

    def after_epoch(self) -> None:
        """Evaluate if it is time."""
        self.improved = False
        trainer = self.trainer
        if not self.evaluators or not (trainer.last_epoch or _is_due(trainer.epoch, self.period)):
            return
        with trainer.timed("evaluate"):
            self.results = {name: evaluate(trainer.model) for name, evaluate in self.evaluators.items()}
        for name, numbers in self.results.items():
            prefix = f"{name}/" if len(self.results) > 1 else ""
            trainer.metrics.update({f"{prefix}{key}": value for key, value in numbers.items()})
        score = next(iter(self.results.values()))["mAP"]
        self.improved = score > self.best
        self.best = max(self.best, score)
        self.waited = 0 if self.improved else self.waited + 1
        if self.patience and self.waited >= self.patience:
            trainer.stop(f"mAP has not risen above {self.best:.2f} in {self.waited} evaluations")

    def state_dict(self) -> dict[str, Any]:
        """Best mAP so far, and for how long there was no better one."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.best, self.waited = state["best"], state["waited"]


class LogHook(HookBase):
    """Averages what the model returns, on the device, and gives it to the writers.

    `seconds_epoch` of a line is the time since the line before, so it holds the save after that one.

    Args:
        writers: see `log.build_writers`; used on rank 0.
        period: steps between two lines; 0 = only one for each epoch.
    """

    order = 90

    def __init__(self, writers: Sequence[Writer], *, period: int = 0) -> None:
        self.writers = writers
        self.period = period

    def before_train(self) -> None:
        """Tell the writers where the run begins."""
        self._since_line = time.perf_counter()
        for writer in self.writers:
            writer.resume(self.trainer.epochs_done, self.trainer.history)

    def before_epoch(self) -> None:
        """Start the averages."""
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._window: dict[str, Tensor] = {}
        self._since = (self.trainer.iter, time.perf_counter())

    def after_step(self) -> None:
        """Add the latest outputs; write when the period is over."""
        self._count += 1
        for name, value in self.trainer.last.items():
            if value.numel() == 1:
                self._sums[name] = self._sums[name] + value if name in self._sums else value.float()
        if self.period and self.trainer.iter % self.period == 0 and self.writers:
            self._write_window()

    def _write_window(self) -> None:
        trainer = self.trainer
        steps, start = trainer.iter - self._since[0], self._since[1]
        means = {name: float((s - self._window.get(name, 0.0)) / steps) for name, s in self._sums.items()}
        trainer.check_finite()
        rate = steps * trainer.batch_size * comm.world() / (time.perf_counter() - start)
        numbers = {**means, "lr": trainer.optimizer.param_groups[0]["lr"], "images_per_second": rate}
        for writer in self.writers:
            writer.step(trainer.iter, numbers)
        self._window = dict(self._sums)
        self._since = (trainer.iter, time.perf_counter())

    def after_epoch(self) -> None:
        """One line for the epoch."""
        trainer = self.trainer
        names = sorted(self._sums)
        means = comm.mean_over_ranks([float(self._sums[name]) / max(1, self._count) for name in names])
        trainer.metrics = {**trainer.logged(), **dict(zip(names, means, strict=True)), **trainer.metrics}
        now = time.perf_counter()
        trainer.metrics["seconds_epoch"], self._since_line = now - self._since_line, now
        trainer.metrics = {name: _plain(value) for name, value in trainer.metrics.items()}
        trainer.history.append({"epoch": trainer.epoch, "iter": trainer.iter, **trainer.metrics})
        for writer in self.writers:
            writer.epoch(trainer.epoch, trainer.iter, trainer.metrics)

    def after_train(self) -> None:
        """Close the writers."""
        for writer in self.writers:
            writer.close()


class CheckpointHook(HookBase):
    """Saves every `period` epochs and after the last one; `best.pth` is the best by mAP on the first test set.

    Args:
        folder: where the files go.
        config: YAML text of the complete config.
        period: epochs; 0 = never.
        keep: newest files that stay.
        improved: tells whether this epoch's evaluation was the best so far.
        images: what tells the training images from others, see `TrainSet.fingerprint`; read on rank 0 when needed.
    """

    order = 100

    def __init__(
        self,
        folder: Path,
        config: str,
        *,
        period: int = 1,
        keep: int = 1,
        improved: Callable[[], bool] = lambda: False,
        images: Callable[[], str] = lambda: "",
    ) -> None:
        self.folder = folder
        self.config = config
        self.period = period
        self.keep = keep
        self.improved = improved
        self.images = images
        self.seconds: float | None = None

    def before_epoch(self) -> None:
        """Give the time of the save to the epoch that follows it, whose line is still to be written."""
        if self.seconds is not None:
            self.trainer.metrics["seconds_checkpoint"] = self.seconds
            self.seconds = None

    def after_epoch(self) -> None:
        """Save if it is time."""
        trainer = self.trainer
        if not self.period or not (trainer.last_epoch or self.improved() or _is_due(trainer.epoch, self.period)):
            return
        comm.report(trainer.iter, f"checkpoint of epoch {trainer.epoch}")
        start = time.perf_counter()
        self._save()
        self.seconds = time.perf_counter() - start

    def _save(self) -> None:
        trainer = self.trainer
        content = {
            **trainer.state_dict(),
            "random": comm.gather_objects(random_state()),
            "history": trainer.history,
            "num_images": trainer.model.num_images,
            "config": self.config,
            "images": self.images() if comm.rank() == 0 else "",
            "is_best": self.improved(),
        }
        if comm.rank() == 0:
            file = self.folder / f"checkpoint_{trainer.epochs_done:04d}.pth"
            checkpoint.save_checkpoint(content, file)
            checkpoint.point_to_last(file)
            if content["is_best"]:
                checkpoint.copy_checkpoint(file, self.folder / checkpoint.BEST)
            self._remove_old(file)

    def _remove_old(self, newest: Path) -> None:
        for old in checkpoint.numbered_checkpoints(self.folder)[: -self.keep or None]:
            if old != newest:
                old.unlink()

    def resume(self) -> None:
        """Continue from the newest checkpoint of the folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was made with another config or other images, or has more epochs than `SOLVER.EPOCHS`.
        """
        file = checkpoint.last_checkpoint(self.folder)
        content = checkpoint.load_checkpoint(file)
        refuse_other_config(content["config"], self.config, file)
        self._refuse_other_run(content, file)
        self.trainer.load_state_dict(content)
        self.trainer.history = content.get("history", [])
        if comm.rank() == 0:  # a run may have been killed before the second file, or before it removed old ones
            if content.get("is_best"):
                checkpoint.copy_checkpoint(file, self.folder / checkpoint.BEST)
            self._remove_old(file)
        if len(content["random"]) == comm.world():
            set_random_state(content["random"][comm.rank()])
        else:
            logger.warning(
                "checkpoint: %s was written by %d processes, now there are %d; random numbers start anew.",
                file,
                len(content["random"]),
                comm.world(),
            )
        logger.info("Resumed from %s after %d epochs", file, self.trainer.epochs_done)

    def _refuse_other_run(self, content: Mapping[str, Any], file: Path) -> None:
        lacking = {"optimizer", "scaler", "hooks", "random", "epochs_done", "iter"} - content.keys()
        if lacking:
            raise InvalidValue(
                f"checkpoint: {file} holds weights without the state of a run ({', '.join(sorted(lacking))}). Start "
                f"anew in another OUTPUT_DIR with MODEL.WEIGHTS {file}."
            )
        if content["epochs_done"] > self.trainer.epochs:
            raise InvalidValue(
                f"SOLVER.EPOCHS is {self.trainer.epochs}, but {file} has done {content['epochs_done']} epochs; as many "
                f"or more are accepted. Raise it, or start anew in another OUTPUT_DIR."
            )
        if content.get("images") and content["images"] != comm.on_first_rank(self.images):
            raise InvalidValue(
                f"checkpoint: {file} was made with other training images: files were added, removed, renamed or "
                f"changed since, and memory and labels count them in order. Restore the images, or start anew in "
                f"another OUTPUT_DIR with MODEL.WEIGHTS {file}."
            )


def _plain(value: Any) -> int | float:
    """A number of NumPy or torch as one of Python, which JSON and checkpoints can hold."""
    return int(value) if isinstance(value, Integral) else float(value)


def _is_due(epoch: int, period: int) -> bool:
    return period > 0 and (epoch + 1) % period == 0
