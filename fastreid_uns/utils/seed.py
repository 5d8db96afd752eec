"""Random state of a process, as plain values that a checkpoint can hold."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python, NumPy and torch; `deterministic` also asks torch for bit-equal CUDA kernels.

    For those it must come before the first matrix product on CUDA.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, by the first product
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - for libraries that draw from it; ours own their generators
    torch.manual_seed(seed)
    if deterministic != torch.are_deterministic_algorithms_enabled():  # the call itself imports much
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not deterministic


def random_state() -> dict[str, Any]:
    """State of all generators of this process: tensors and plain values."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002
    name, keys, position, has_gauss, cached = numpy_state
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` gave."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
