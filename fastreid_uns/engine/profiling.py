"""A look at where the time of training steps goes."""

from __future__ import annotations

import logging
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule

from fastreid_uns.errors import InvalidValue
from fastreid_uns.hook import HookBase
from fastreid_uns.registry import HOOK_REGISTRY
from fastreid_uns.utils import comm
from fastreid_uns.utils.atomic import replacing

logger = logging.getLogger(__name__)
_ROWS = 40  # operations in the table


@HOOK_REGISTRY.register()
class ProfileHook(HookBase):
    """Writes a torch profiler trace of some steps, and a table of the operations that took longest.

    Each process writes `trace_rank<r>.json.gz` and `operations_rank<r>.txt`. The trace opens in ui.perfetto.dev and in
    chrome://tracing. Steps count from the start or the resumption of the run, over epochs; what stands between two
    epochs belongs to the step after it.

    Args:
        wait: steps before anything is recorded.
        warmup: steps recorded and thrown away, in which the profiler settles.
        active: steps in the trace, from 1.
        folder: where the files go; "" = `profile` in `OUTPUT_DIR`.

    Raises:
        ValueError: a count out of range, or no folder where the trainer has none.
    """

    order = 95

    def __init__(self, *, wait: int = 5, warmup: int = 2, active: int = 3, folder: str = "") -> None:
        if wait < 0 or warmup < 0 or active < 1:
            raise InvalidValue(
                f"HOOKS: ProfileHook has WAIT {wait}, WARMUP {warmup} and ACTIVE {active}; steps from 0 are accepted, "
                f"and ACTIVE from 1. Change them."
            )
        self.steps = {"wait": wait, "warmup": warmup, "active": active}
        self.folder = folder
        self.written: list[Path] = []
        self._profile: profile | None = None

    def before_train(self) -> None:
        """Begin to count steps."""
        if not self.folder and self.trainer.folder is None:
            raise InvalidValue("HOOKS: ProfileHook has no FOLDER and the trainer none of its own. Name one.")
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.trainer.device.type == "cuda" else [])]
        self._profile = profile(
            activities=kinds, schedule=schedule(**self.steps, repeat=1), on_trace_ready=self._write, record_shapes=True
        )
        self._profile.start()

    def after_step(self) -> None:
        """Count the step."""
        if self._profile is not None and not self.written:
            self._profile.step()

    def after_train(self) -> None:
        """Write what there is of a run that was too short."""
        if self._profile is None or self.written:
            return
        self._profile.stop()
        if not self.written:
            logger.warning("ProfileHook: the run had no step after WAIT and WARMUP, so there is no trace; lower them.")

    def _write(self, done: profile) -> None:
        folder = Path(self.folder) if self.folder else Path(self.trainer.folder or ".") / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        trace = folder / f"trace_rank{comm.rank()}.json.gz"
        done.export_chrome_trace(str(trace))
        table = folder / f"operations_rank{comm.rank()}.txt"
        key = "self_device_time_total" if self.trainer.device.type == "cuda" else "self_cpu_time_total"
        with replacing(table) as stream:
            stream.write(done.key_averages().table(sort_by=key, row_limit=_ROWS).encode())
        self.written = [trace, table]
        logger.info("Profile: %s and %s", trace, table)
