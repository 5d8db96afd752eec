"""What the tests of the core and those of the projects share."""

from __future__ import annotations

import json

import pytest
import torch

torch.set_num_threads(1)  # networks this small gain nothing from a second thread


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def tiny_set(tmp_path_factory) -> dict:
    """Config section of a generated set: 12 training identities, 3 cameras, 32 x 16 pixels."""
    return {
        "NAME": "synthetic",
        "ROOT": str(tmp_path_factory.mktemp("synthetic")),
        "TRAIN_IDENTITIES": 12,
        "TRAIN_IMAGES": 96,
        "TEST_IDENTITIES": 6,
        "QUERY_IMAGES": 12,
        "GALLERY_IMAGES": 36,
        "DISTRACTORS": 4,
        "JUNK": 2,
        "CAMERAS": 3,
        "DIFFICULTY": 0.2,
        "SIZE": [32, 16],
    }


@pytest.fixture
def tiny(tiny_set, tmp_path) -> list[str]:
    """Overrides that bring a config to the tiny set, a small network and two epochs of two steps."""
    values = {
        "DATASETS.TRAIN": tiny_set,
        "DATASETS.TESTS.synthetic": tiny_set,
        "INPUT.SIZE": [32, 16],
        "DATALOADER.WORKERS": 0,
        "DATALOADER.SAMPLER.BATCH_SIZE": 16,
        "DATALOADER.SAMPLER.NUM_INSTANCES": 4,
        "MODEL.BACKBONE.NAME": "SmallNet",
        "MODEL.WEIGHTS": "",
        "MODEL.DEVICE": "cpu",
        "SOLVER.EPOCHS": 2,
        "SOLVER.ITERS_PER_EPOCH": 2,
        "SOLVER.AMP": "none",
        "LOG.WRITERS": ["json"],
        "OUTPUT_DIR": str(tmp_path / "run"),
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
