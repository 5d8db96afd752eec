"""Reference inputs and outputs of ACFL, float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
FEATURES = ["acfl_hpf_01_tiny", "acfl_hpf_02_paper", "acfl_hpf_03_meanC_V3", "acfl_hpf_04_tau01_V14"]
ON_SPHERE = [name for name in FEATURES if "meanC" not in name]


def golden(name: str) -> dict[str, Tensor]:
    """The arrays of a file; numbers as tensors without dimension."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(np.array(file[key])) for key in file.files}
