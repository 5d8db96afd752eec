"""The training commands that `faults.py` does harm to, and how they are started, killed and waited for.

A command is a process of its own. It is forked from this one, in which torch and the package are imported already, so
that it takes a second instead of six; all that comes after the imports is as on the command line. A *cold* command
is started by the shell's way instead, as several processes need it.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measuring import FOLDER, ROOT

THREADS = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
TIMEOUT = 300  # seconds after which a command counts as hanging
PLACE = FOLDER / "faults"
STRUCK = PLACE / "struck"  # when the last command of `strike_in` was struck, by the clock that all processes share
EPOCHS = 3
IMAGES = {
    "NAME": "synthetic",
    "ROOT": str(FOLDER / "images"),
    "TRAIN_IDENTITIES": 8,
    "TRAIN_IMAGES": 64,
    "TEST_IDENTITIES": 4,
    "QUERY_IMAGES": 8,
    "GALLERY_IMAGES": 16,
    "DISTRACTORS": 2,
    "JUNK": 2,
    "CAMERAS": 3,
    "DIFFICULTY": 0.2,
    "SIZE": [32, 16],
}
CONFIG = {  # of every method, over its own config for generated images
    "DATASETS": {"TRAIN": IMAGES, "TESTS": {"synthetic": IMAGES}},
    "INPUT": {"SIZE": [32, 16]},
    "DATALOADER": {"WORKERS": 0, "SAMPLER": {"BATCH_SIZE": 16, "NUM_INSTANCES": 4}},
    "MODEL": {"BACKBONE": {"WIDTH": 8}, "DEVICE": "cpu"},
    "PSEUDO_LABELS": {"K1": 8},
    "SOLVER": {"EPOCHS": EPOCHS, "ITERS_PER_EPOCH": 3, "AMP": "none"},
    "TEST": {"PERIOD": 1},
    "LOG": {"WRITERS": ["text", "json"]},
}
IMPORTED = (
    "fastreid_uns.builtin",
    "fastreid_uns.commands.train",
    "fastreid_uns.data.augment_kernels",
    "fastreid_uns.engine.default",
    "fastreid_uns.evaluation.ranking_kernels",
    "fastreid_uns.pseudo_labels.jaccard_kernels",
    "fastreid_uns.pseudo_labels.search.kernels",
    "numba",
    "sklearn.metrics",
    "torch._dynamo",
)
TRACED = {  # where the record is written: file → its functions, None = all
    "utils/atomic.py": None,
    "utils/checkpoint.py": None,
    "engine/hooks.py": ("_save", "after_epoch"),
    "engine/log.py": ("epoch", "resume"),
}


class Ended(NamedTuple):
    """A command that has ended: its exit code (None = it hung and was killed) and what it said."""

    code: int | None
    text: str

    @property
    def refusal(self) -> str:
        """Why this is no clean refusal; empty if it is one."""
        if self.code is None:
            return f"hung for {TIMEOUT} s"
        if "Traceback" in self.text:
            return f"traceback: {self.text.strip().splitlines()[-1][:150]}"
        if self.code == 0:
            return "silent: it went on with exit code 0"
        return "" if self.code == 2 and "error: " in self.text else f"exit code {self.code}: {self.text[-150:]!r}"


class Command:
    """A running command in a process group of its own.

    Args:
        words: the program and its arguments.
        limit: bytes beyond which none of its files may grow; None = no limit.
        cold: start Python anew.
        line: SIGKILL it before that line of `TRACED`, see `die_at_line`.
        struck: a function, and the signal that it gets when it first enters it, see `strike_in`.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        limit: int | None = None,
        cold: bool = False,
        line: int | None = None,
        struck: tuple[str, int] | None = None,
    ):
        read, write = os.pipe()
        fcntl.fcntl(read, fcntl.F_SETPIPE_SZ, 1 << 20)

        def before() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        if cold:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, **THREADS},
                stdout=write,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=before,
            )
            self.pid = self.process.pid
        else:
            self.pid = os.fork()
            if self.pid == 0:
                os.setpgid(0, 0)
                before()
                if struck:
                    strike_in(*struck)
                _become(words, write, line)
            with contextlib.suppress(OSError):  # both do it, so that neither has to wait for the other
                os.setpgid(self.pid, self.pid)
        os.close(write)
        self.code: int | None = None
        self._stream, self._text = os.fdopen(read, "rb", buffering=0), b""

    def runs(self) -> bool:
        """Whether it has not ended yet."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                if hasattr(self, "process"):
                    self.process.returncode = self.code
        return self.code is None

    def wait_for(self, text: str) -> None:
        """Until it has said that, or has ended."""
        while self.runs() and text.encode() not in self._text:
            self._read(0.05)

    def kill(self) -> None:
        """SIGKILL to it and to all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = TIMEOUT) -> Ended:
        """Its end; if it does not end, it is killed."""
        until = time.monotonic() + seconds
        while self.runs() and time.monotonic() < until:
            self._read(0.01)
        hung = self.runs()
        self.kill()  # what it may have left
        while self.runs():
            time.sleep(0.005)
        while self._read(0.0):
            pass
        self._stream.close()
        return Ended(None if hung else self.code, self._text.decode("utf-8", "replace"))

    def _read(self, seconds: float) -> bool:
        with selectors.DefaultSelector() as selector:
            selector.register(self._stream, selectors.EVENT_READ)
            data = self._stream.read(1 << 16) if selector.select(seconds) else b""
        self._text += data or b""
        if not data and seconds:
            time.sleep(seconds / 10)
        return bool(data)


def run(words: Sequence[str], **keys: Any) -> Ended:
    """Start a command and wait for its end."""
    return Command(words, **keys).wait()


def arguments_of(method: str, folder: Path, *more: str, processes: int = 1) -> list[str]:
    """The training command of a method on few images."""
    return [
        *(str(ROOT / "tools/train_net.py"), "--config-file", str(config_of(method))),
        *(["--num-gpus", str(processes)] if processes > 1 else []),
        *(f"OUTPUT_DIR={folder}", *more),
    ]


@functools.cache
def config_of(method: str) -> Path:
    """The file with the config of a method for few images; keys on the command line change it as any other."""
    base = ROOT / ("configs/quickstart.yaml" if method == "core" else f"projects/{method}/configs/synthetic.yaml")
    file = PLACE / f"{method}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"_BASE_": str(base), **CONFIG}))
    return file


def warm_up() -> None:
    """Import once what every command imports."""
    import torch
    from PIL import Image

    for module in IMPORTED:
        importlib.import_module(module)
    Image.init()
    torch.set_num_threads(1)


def _become(words: Sequence[str], output: int, line: int | None) -> None:
    """In a forked child: the program, its output in a pipe, and the end of the process."""
    code = 1
    try:
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        os.environ.update(THREADS)
        os.chdir(ROOT)
        sys.argv = list(words)
        if line is None:
            runpy.run_path(words[0], run_name="__main__")
        else:
            die_at_line(line)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:  # as an interpreter ends
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)


def strike_in(place: str, number: int) -> None:
    """Let this process send itself a signal when it first calls a function.

    Args:
        place: `module:function` or `module:Class.method`, looked up where the callers look it up.
        number: of the signal.
    """
    module, _, name = place.partition(":")
    *classes, last = name.split(".")
    holder: Any = functools.reduce(getattr, classes, importlib.import_module(module))
    whole = getattr(holder, last)

    def struck(*args: Any, **keys: Any) -> Any:
        setattr(holder, last, whole)
        STRUCK.write_text(str(time.monotonic()))
        os.kill(os.getpid(), number)
        return whole(*args, **keys)

    setattr(holder, last, struck)


def die_at_line(number: int) -> None:
    """Run the program of `sys.argv`, SIGKILL before the line of that number, counted over those of `TRACED`.

    0 only counts them; the count is the last line of stdout.
    """
    count = 0
    files = {str(ROOT / "fastreid_uns" / name): functions for name, functions in TRACED.items()}

    def line(frame: Any, event: str, _: Any) -> Callable[..., Any]:
        nonlocal count
        if event == "line":
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame: Any, event: str, _: Any) -> Callable[..., Any] | None:
        code = frame.f_code
        if code.co_filename not in files:
            return None
        functions = files[code.co_filename]
        return line if functions is None or code.co_name in functions else None

    sys.settrace(call)
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.settrace(None)
        print(f"\n{count}", flush=True)
