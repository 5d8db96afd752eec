"""The largest batch of a training step that fits a card with less memory: the limit is set for the process.

A batch fits if two steps follow each other. Batches are multiples of 32, which share norm statistics. A card of 24 GB
is taken as 24e9 bytes less those of the CUDA context.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import measuring
import training_step

STEP = 32  # images
CONTEXT = 6e8  # bytes of a process beside its tensors
CPU_MOST = 64  # images: without a limit this is where the search ends


def cases(size: str) -> list[measuring.Case]:
    if size == "small":
        return [{"form": "ours", "device": "cpu", "backbone": "resnet18", "size": [32, 16], "gigabytes": 0}]
    cuda = {"device": "cuda", "backbone": "resnet50", "size": [256, 128]}
    return [
        {"form": form, **cuda, "gigabytes": gigabytes} for gigabytes in (24, 80) for form in ("ours", "float32", "ACFL")
    ]


def measure(form: str, device: str, backbone: str, size: list[int], gigabytes: int) -> dict[str, Any]:
    """The largest batch, and images a second with it."""
    import time

    import torch

    trainer, images = training_step.build(form, device, backbone, STEP, size, **{"MODEL.GHOST_BATCH": STEP})
    trainer.model.train()
    if device == "cuda":
        torch.backends.cudnn.benchmark = False  # it would try every kernel for every size
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gigabytes * 1e9 - CONTEXT) / total))

    def step(batch: int) -> None:
        rows = torch.arange(batch) % STEP
        trainer.step(images.rows(rows)._replace(most=training_step.PER_CLUSTER * (batch // STEP)))
        if device == "cuda":
            torch.cuda.synchronize()

    def fits(batch: int) -> bool:
        if device == "cuda":
            trainer.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        try:
            step(batch)
            step(batch)  # in what the first one has left in pieces
        except torch.OutOfMemoryError:
            return False
        return True

    result: dict[str, Any] = {"precision": str(trainer.amp or "float32")}
    batch = largest(fits, STEP, CPU_MOST if device == "cpu" else 2**16)
    fits(batch)
    start = time.perf_counter()
    step(batch)
    return {**result, "batch": batch, "images_per_second": batch / (time.perf_counter() - start)}


def largest(fits: Callable[[int], bool], step: int, most: int) -> int:
    """The largest multiple of `step`, up to `most`, that fits; 0 if none does. Twice as many are tried, then halves."""
    good, bad = 0, most // step + 1
    while good + 1 < bad:
        tried = min(max(1, 2 * good), bad - 1) if bad > most // step else (good + bad) // 2
        if fits(tried * step):
            good = tried
        else:
            bad = tried
    return good * step


if __name__ == "__main__":
    measuring.main(__doc__, __file__, cases, measure)
