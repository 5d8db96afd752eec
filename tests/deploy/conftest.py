"""A small network whose features tell pictures apart, and such pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastreid_uns.config import load_config
from fastreid_uns.modeling.meta_arch import build_model
from fastreid_uns.modeling.whitening import MainDirections

HEIGHT, WIDTH = 64, 32

Pictures = Callable[[int, int], np.ndarray]


@pytest.fixture(scope="session")
def pictures() -> Pictures:
    """(count, seed) → (B,H,W,3) uint8 RGB, each a pattern of 8 x 4 colours of its own."""

    def draw(count: int, seed: int) -> np.ndarray:
        random = np.random.default_rng(seed)
        coarse = random.integers(0, 256, (count, HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
        return coarse.repeat(8, axis=1).repeat(8, axis=2)

    return draw


@pytest.fixture(scope="session")
def make_run(pictures: Pictures) -> Callable[..., Path]:
    """(folder, mean, std) → the folder, with the checkpoint of an encoder whose whitening is fitted to pictures."""

    def make(folder: Path, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)) -> Path:
        keys = [f"INPUT.SIZE=[{HEIGHT}, {WIDTH}]", f"INPUT.MEAN={list(mean)}", f"INPUT.STD={list(std)}"]
        keys += ["MODEL.BACKBONE.NAME=SmallNet", "MODEL.HEAD.NAME=PooledHead", "MODEL.HEAD.DIM=32", "MODEL.HEAD.GRID=2"]
        cfg = load_config(None, [*keys, "MODEL.MEMORY.NAME=", "MODEL.LOSSES.contrast=null"])
        torch.manual_seed(1)
        model = build_model(cfg, 4).eval()
        with torch.no_grad():
            pooled = model.encoder(torch.from_numpy(pictures(80, 7)).permute(0, 3, 1, 2)).pooled
            model.encoder.head.whitening.fit(MainDirections.of(pooled.unflatten(0, (40, 2)), 32))
        content = {"model": model.state_dict(), "config": cfg.dump(), "num_images": 4}
        torch.save(content, folder / "checkpoint_0001.pth")
        (folder / "last").write_text("checkpoint_0001.pth\n")
        return folder

    return make
