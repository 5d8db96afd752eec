"""What grouping will take, measured on this machine before it begins."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch

from fastreid_uns.photos.embed import BATCH, Stages
from fastreid_uns.photos.group import Settings
from fastreid_uns.photos.network import Network
from fastreid_uns.photos.teller import duration
from fastreid_uns.photos.view_store import on_device
from fastreid_uns.utils.environment import cores

_TRIED = 16  # views whose time is taken on a CPU; on a GPU as many as one pass has
_REST = 1.5  # work of everything, with that of the views through the network as 1: reading, changing, training
_TRAINED = 1.4  # work of a view that is trained on, in the same unit
_BASE = 0.7e9  # bytes of Python, torch and the network
_READ = 0.04  # seconds of one core to read a photo


class Cost(NamedTuple):
    """Of grouping; rough."""

    seconds: float
    memory: float  # bytes
    disk: float  # bytes, most of them only meanwhile

    def __str__(self) -> str:
        memory, disk = (f"{value / 1e9:.1f} GB" for value in (self.memory, self.disk))
        return f"this will take about {duration(self.seconds)}, {memory} of memory and {disk} of disk"


@torch.no_grad()
def estimate(count: int, network: Network, settings: Settings) -> Cost:
    """What grouping so many photos takes on the device of the network; a second of work."""
    device, training = network.encoder.mean.device, settings.adaptation.steps > 0
    stages = Stages.of(network.encoder, network.size, trained=training, amp=settings.amp)
    tried = _TRIED if device.type == "cpu" else BATCH * settings.views
    views = torch.rand(tried, 3, *network.size, device=device)
    stages.pooled(stages.activations(views[:1] if device.type == "cpu" else views))
    begin = _now(device)
    kept = stages.activations(views)
    pooled = stages.pooled(kept)
    each = (_now(device) - begin) / tried
    number = count * settings.views
    features = 4.0 * number * pooled.shape[1]
    stored = 2.0 * number * np.prod(kept.shape[1:]) if training else features
    pixels = 3.0 * count * np.prod(network.size)
    trained = 2 * settings.adaptation.steps * min(settings.adaptation.batch, count) * _TRAINED * each
    return Cost(
        _READ * count / cores() + _REST * number * each + trained,
        _BASE + 2 * features,
        pixels + (0.0 if on_device(int(stored), device) else stored),
    )


def _now(device: torch.device) -> float:
    """Seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()
