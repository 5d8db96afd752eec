"""Matrix products and convolutions in true float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Matrix products and, from torch 2.9 on, convolutions in true float32, whatever training has chosen.

    Rounding to TF32 would reorder neighbours.
    """
    places: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
        getattr(torch.backends.cudnn, "conv", None),
    )
    backends = [place for place in places if hasattr(place, "fp32_precision")]
    kept = [b.fp32_precision for b in backends] if backends else torch.get_float32_matmul_precision()
    _set_precision(backends, ["ieee"] * len(backends) if backends else "highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _set_precision(backends, kept)


def _set_precision(backends: list[Any], values: list[str] | str) -> None:
    if isinstance(values, str):  # torch before 2.9
        torch.set_float32_matmul_precision(values)
        return
    for backend, value in zip(backends, values, strict=True):
        backend.fp32_precision = value
