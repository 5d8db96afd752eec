"""Where numbers go: text, JSON lines, TensorBoard, and services that are imported only when named."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastreid_uns.engine.run_folder import unwritable
from fastreid_uns.errors import MissingPackage, UnknownName
from fastreid_uns.registry import did_you_mean
from fastreid_uns.utils import comm
from fastreid_uns.utils.atomic import append, replacing

logger = logging.getLogger("fastreid_uns")


def setup_logging(folder: Path | None, console: int = logging.INFO) -> None:
    """Lines to the console and to a file of each process, which has the tracebacks too.

    Rank 0 writes `log.txt`, rank r `log_rank<r>.txt`; ranks above 0 say only warnings on the console. Calling it again
    changes the folder. Where the program shows log records on its console already, no second console is added.

    Args:
        folder: exists; None for no file.
        console: level from which rank 0 speaks on the console.

    Raises:
        RuntimeError: the file cannot be written, or is a link, which is not followed.
    """
    logger.setLevel(logging.DEBUG)
    for old in [handler for handler in logger.handlers if isinstance(handler, (_Console, _File))]:
        logger.removeHandler(old)
        old.close()
    handlers: list[logging.Handler] = []
    if not any(_is_console(handler) for handler in (*logger.handlers, *logging.getLogger().handlers)):
        handlers.append(_Console(console if comm.rank() == 0 else logging.WARNING))
    if folder is not None:
        handlers.append(_File(folder / (f"log_rank{comm.rank()}.txt" if comm.rank() else "log.txt")))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)


def _is_console(handler: logging.Handler) -> bool:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)


class _Console(logging.Handler):
    """Writes to what `sys.stdout` is at that moment: notebooks and tests exchange it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError, ValueError):  # the reader of a pipe has gone
            sys.stdout.write(f"{self.format(record)}\n")
            sys.stdout.flush()


class _File(logging.FileHandler):
    """Appends to a file that is no link; says once when the disk is full."""

    def __init__(self, file: Path) -> None:
        try:
            super().__init__(file, encoding="utf-8")
        except OSError as error:
            raise unwritable(file, error) from error
        self.failed = False

    def _open(self) -> Any:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        handle = os.open(self.baseFilename, flags, 0o644)  # not blocking: a pipe without a reader is an error
        return os.fdopen(handle, "a", encoding=self.encoding)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.failed:
            self.failed = True
            sys.stderr.write(f"warning: {self.baseFilename} cannot be written ({sys.exc_info()[1]}); lines are lost.\n")


class Writer(Protocol):
    """Takes the numbers of steps and epochs."""

    def resume(self, epoch: int, lines: Sequence[Mapping[str, float]]) -> None:
        """Forget what was written of `epoch` and later ones, which will be run again; restore what is lost of `lines`.

        Args:
            epoch: the one that comes next.
            lines: `epoch`, `iter` and numbers of the epochs before it, as far as the checkpoint has them.
        """

    def step(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Numbers of the steps since the last call."""

    def epoch(self, epoch: int, iteration: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a whole epoch."""

    def close(self) -> None:
        """Flush and release."""


class TextWriter:
    """One line for each epoch and each period of steps, to the logger."""

    def resume(self, epoch: int, lines: Sequence[Mapping[str, float]]) -> None:
        """Nothing to forget."""

    def step(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """A line such as `step 100  loss 2.31  lr 0.00035`."""
        logger.info("  step %d  %s", iteration, _phrase(numbers))

    def epoch(self, epoch: int, iteration: int, numbers: Mapping[str, float]) -> None:
        """A line with clusters, losses, scores and seconds of each stage."""
        stages = {k.removeprefix("seconds_"): v for k, v in numbers.items() if k.startswith("seconds_")}
        rest = {k: v for k, v in numbers.items() if not k.startswith("seconds_")}
        seconds = "  ".join(f"{name} {value:.1f}" for name, value in stages.items())
        logger.info("epoch %d  %s  seconds: %s", epoch, _phrase(rest), seconds)

    def close(self) -> None:
        """Nothing to release."""


class JsonWriter:
    """`metrics.jsonl`: one line for each epoch."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "metrics.jsonl"

    def resume(self, epoch: int, lines: Sequence[Mapping[str, float]]) -> None:
        """Write the lines of the epochs before anew: those of the file where they are whole, else the given ones."""
        known = {line["epoch"]: line for line in [*lines, *read_metrics(self.file)] if line["epoch"] < epoch}
        if not known and not os.path.lexists(self.file):
            return
        text = "".join(f"{json.dumps(known[number])}\n" for number in sorted(known))
        try:
            with replacing(self.file) as stream:
                stream.write(text.encode())
        except OSError as error:
            raise unwritable(self.file, error) from error

    def step(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Steps are not written."""

    def epoch(self, epoch: int, iteration: int, numbers: Mapping[str, float]) -> None:
        """Append a line.

        Raises:
            RuntimeError: the disk is full or not writable, or a link is in the place of the file.
        """
        line = json.dumps({"epoch": epoch, "iter": iteration, **numbers})
        try:
            append(self.file, f"{line}\n".encode())
        except OSError as error:
            raise unwritable(self.file, error) from error

    def close(self) -> None:
        """Nothing to release."""


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; none if there is no such file.

    A line that a full disk, or a copy that was broken off, left incomplete is passed over with a warning.
    """
    lines = []
    for number, text in enumerate(
        file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else [], 1
    ):
        try:
            line = json.loads(text)
            line["epoch"] = int(line["epoch"])
        except (ValueError, TypeError, KeyError):
            logger.warning("%s: line %d is damaged (%r) and is passed over.", file, number, text[-40:])
        else:
            lines.append(line)
    return lines


class TensorBoardWriter:
    """Event files in `OUTPUT_DIR/tensorboard`, the first one with the first number."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._open = functools.partial(SummaryWriter, str(folder / "tensorboard"))

    @functools.cached_property
    def writer(self) -> Any:
        """The writer of torch, made when it is first needed: a run that is refused leaves no file."""
        return self._open()

    def resume(self, epoch: int, lines: Sequence[Mapping[str, float]]) -> None:
        """TensorBoard shows the later events over the earlier ones."""

    def step(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Scalars below `step/`."""
        for name, value in numbers.items():
            self.writer.add_scalar(f"step/{name}", value, iteration)

    def epoch(self, epoch: int, iteration: int, numbers: Mapping[str, float]) -> None:
        """Scalars below `epoch/`."""
        for name, value in numbers.items():
            self.writer.add_scalar(f"epoch/{name}", value, epoch)

    def close(self) -> None:
        """Flush the event file."""
        if "writer" in vars(self):
            self.writer.close()


class WandbWriter:
    """Weights & Biases; the package must be installed and logged in."""

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        self._open = functools.partial(wandb.init, dir=str(folder), name=folder.name)

    @functools.cached_property
    def run(self) -> Any:
        """The run there, begun with the first number."""
        return self._open()

    def resume(self, epoch: int, lines: Sequence[Mapping[str, float]]) -> None:
        """A resumed run is a new one there."""

    def step(self, iteration: int, numbers: Mapping[str, float]) -> None:
        """Numbers below `step/`."""
        self.run.log({f"step/{name}": value for name, value in numbers.items()}, step=iteration)

    def epoch(self, epoch: int, iteration: int, numbers: Mapping[str, float]) -> None:
        """Numbers below `epoch/`."""
        self.run.log({"epoch": epoch, **{f"epoch/{k}": v for k, v in numbers.items()}}, step=iteration)

    def close(self) -> None:
        """Finish the run."""
        if "run" in vars(self):
            self.run.finish()


def build_writers(names: list[str], folder: Path) -> list[Writer]:
    """The writers of `LOG.WRITERS`.

    Raises:
        KeyError: unknown name.
    """
    known: dict[str, Any] = {
        "text": lambda _: TextWriter(),
        "json": JsonWriter,
        "tensorboard": TensorBoardWriter,
        "wandb": WandbWriter,
    }
    for name in names:
        if name not in known:
            raise UnknownName(f"LOG.WRITERS: {name!r} is unknown{did_you_mean(name, known)} Known: {', '.join(known)}.")
    return [known[name](folder) for name in names]


def _missing(package: str) -> MissingPackage:
    return MissingPackage(
        f"LOG.WRITERS: {package} needs the package {package}, which is not installed. Run `pip install {package}`, or "
        f"take the name out of LOG.WRITERS."
    )


def _phrase(numbers: Mapping[str, float]) -> str:
    return "  ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.4g}" for k, v in numbers.items())
