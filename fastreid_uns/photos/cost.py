"""What grouping will take, measured on this machine before it begins."""

from __future__ import annotations

import time
from typing import NamedTuple

import numpy as np
import torch

from fastreid_uns.photos.embed import IN_MEMORY, Stages
from fastreid_uns.photos.group import Settings
from fastreid_uns.photos.network import Network
from fastreid_uns.photos.teller import duration

_TRIED = 16  # views whose time is taken
_REST = 1.5  # work of everything, with that of the views through the network as 1: reading, changing, training
_BASE = 0.7e9  # bytes of Python, torch and the network
_READ = 0.02  # seconds to read a photo


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
    """What grouping so many photos takes; a second of work."""
    stages = Stages.of(network.encoder, trained=settings.adaptation.steps > 0)
    views = torch.rand(_TRIED, 3, *network.size)
    stages.activations(views[:1])
    begin = time.monotonic()
    kept = stages.activations(views)
    pooled = stages.pooled(kept)
    each = (time.monotonic() - begin) / _TRIED
    number = count * settings.views
    activations = 2.0 * number * np.prod(kept.shape[1:]) if settings.adaptation.steps else 0.0
    features = 4.0 * number * pooled.shape[1]
    pixels = 3.0 * count * np.prod(network.size)
    held = activations if activations <= IN_MEMORY else 0.0
    trained = 2 * settings.adaptation.steps * min(settings.adaptation.batch, count) * each
    return Cost(
        _READ * count + _REST * number * each + trained,
        _BASE + held + 2 * features,
        pixels + activations - held,
    )
