"""Which precision makes a training step on this CPU faster, by measurement.

A processor that computes in bfloat16 is not always faster in it, and some versions of its library read memory that
holds no number: then the sum of an ordinary convolution is not finite.
"""

from __future__ import annotations

import json
import logging
import os
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_uns.utils.atomic import replacing
from fastreid_uns.utils.environment import processor

logger = logging.getLogger(__name__)

SHAPES = ((4, 64, 64, 32), (4, 128, 32, 16), (4, 256, 16, 8))  # batch, channels, height, width of a ResNet
ROUNDS = 3
FASTER = 1.05  # times as fast as float32 must bfloat16 be
PROBES = 40  # of the small convolution that goes wrong where it does


@cache
def faster_precision() -> torch.dtype | None:
    """bfloat16 if it is sound and faster on this CPU, else None; measured once for each machine and kept in a file."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    name = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    known = _read(_file())
    if name not in known:
        known[name] = "bfloat16" if is_sound() and _seconds(None) > FASTER * _seconds(torch.bfloat16) else "none"
        logger.info("Precision on this CPU, by measurement: %s (SOLVER.AMP auto)", known[name])
        _write(_file(), known)
    return torch.bfloat16 if known[name] == "bfloat16" else None


@torch.no_grad()
def is_sound() -> bool:
    """Whether small convolutions in bfloat16 are finite beside freed memory that held NaN."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 128, 4, 2, generator=generator)
    weight = torch.randn(256, 128, 3, 3, generator=generator) / 34
    for layout in (torch.contiguous_format, torch.channels_last):
        rows = images.to(memory_format=layout)
        for _ in range(PROBES):
            freed = [torch.full((2**16,), torch.nan, dtype=torch.bfloat16) for _ in range(8)]
            del freed
            with torch.autocast("cpu", torch.bfloat16):
                if not bool(F.conv2d(rows, weight, stride=2, padding=1).isfinite().all()):
                    return False
    return True


def _seconds(dtype: torch.dtype | None) -> float:
    """The best of a few times for a forward and a backward pass through convolutions of a ResNet."""
    best = 0.0
    for shape in SHAPES:
        images = torch.zeros(shape).to(memory_format=torch.channels_last).requires_grad_()
        weight = torch.zeros(shape[1], shape[1], 3, 3).requires_grad_()
        best += min(_pass(images, weight, dtype) for _ in range(ROUNDS + 1))
    return best


def _pass(images: Tensor, weight: Tensor, dtype: torch.dtype | None) -> float:
    begin = time.perf_counter()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        F.conv2d(images, weight, padding=1).sum().backward()
    return time.perf_counter() - begin


def _file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fastreid_uns" / "precision.json"


def _read(file: Path) -> dict[str, str]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(file: Path, known: dict[str, str]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            stream.write(json.dumps(known, indent=2).encode())
    except OSError as error:
        logger.debug("%s cannot be written (%s); it is measured again in the next run", file, error)
