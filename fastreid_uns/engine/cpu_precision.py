"""Which precision makes training and inference on this CPU faster, by measurement.

A processor that computes in bfloat16 is not always faster in it, and some versions of its library read memory that
holds no number: then the sum of an ordinary convolution is not finite.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.modeling.backbones.base import feature_map
from fastreid_uns.utils.atomic import replacing
from fastreid_uns.utils.environment import processor
from fastreid_uns.utils.timing import least_seconds

logger = logging.getLogger(__name__)

SHAPES = ((4, 64, 64, 32), (4, 128, 32, 16), (4, 256, 16, 8))  # batch, channels, height, width of a ResNet
ROUNDS, INFERENCE_ROUNDS = 10, 3  # the best of which counts
FASTER = 1.05  # times as fast as float32 must bfloat16 be
NEAR = 0.1  # of the length of the output is what bfloat16 may differ by in inference
PROBES = 40  # of the small convolution that goes wrong where it does


@cache
def faster_precision() -> torch.dtype | None:
    """bfloat16 if it is sound and faster on this CPU, else None; measured once for each machine and kept in a file."""
    return _remembered("", lambda: is_sound() and _is_faster(map(_convolution, SHAPES), ROUNDS))


@torch.no_grad()
def faster_inference(network: nn.Module, images: Tensor) -> torch.dtype | None:
    """bfloat16 if a network is faster in it on this CPU and makes nearly the same of images, else None; kept as well.

    Args:
        network: in evaluation mode, on the CPU.
        images: (B, C, H, W) as many as go through it at a time; fewer than B must be right as well.
    """

    def is_better() -> bool:
        expected = _inference(network, images, None)
        if not all(_is_near(network, images[:number], expected[:number]) for number in range(1, len(images) + 1)):
            return False
        return _is_faster([partial(_inference, network, images)], INFERENCE_ROUNDS)

    shapes = [tuple(images.shape), *(tuple(value.shape) for value in network.parameters())]
    return _remembered(f", inference {zlib.crc32(repr(shapes).encode()):08x}", is_better)


def _remembered(what: str, is_better: Callable[[], bool]) -> torch.dtype | None:
    """bfloat16 if it is better for training ("") or for what else is named, else None; measured once a machine."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return None
    name = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}{what}"
    known = _read(_file())
    if name not in known:
        known[name] = "bfloat16" if is_better() else "none"
        logger.info("Precision on this CPU%s, by measurement: %s", what, known[name])
        _write(_file(), known)
    return torch.bfloat16 if known[name] == "bfloat16" else None


def _is_near(network: nn.Module, images: Tensor, expected: Tensor) -> bool:
    """Whether bfloat16 beside freed memory that held NaN gives the output of float32 but for rounding."""
    freed = [torch.full((2**16,), torch.nan, dtype=torch.bfloat16) for _ in range(8)]
    del freed
    found = _inference(network, images, torch.bfloat16)
    return bool((found - expected).norm() < NEAR * expected.norm())  # False for NaN


def _is_faster(passes: Iterable[Callable[[torch.dtype | None], object]], rounds: int) -> bool:
    """Whether bfloat16 takes fewer seconds than float32 for all passes together, each at the best of its rounds."""
    seconds = [least_seconds(partial(run, None), partial(run, torch.bfloat16), rounds=rounds) for run in passes]
    float32, bfloat16 = map(sum, zip(*seconds, strict=True))
    return float32 > FASTER * bfloat16


def _inference(network: nn.Module, images: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Output in float32."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return feature_map(network(images)).float()


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


def _convolution(shape: tuple[int, ...]) -> Callable[[torch.dtype | None], None]:
    """A forward and a backward pass through a convolution of a ResNet, in the precision that is given."""
    images = torch.zeros(shape).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.zeros(shape[1], shape[1], 3, 3).requires_grad_()

    def run(dtype: torch.dtype | None) -> None:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            F.conv2d(images, weight, padding=1).sum().backward()

    return run


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
