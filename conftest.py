"""What the tests of the core and those of the projects share."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

logger = logging.getLogger("fastreid_uns")
torch.set_num_threads(1)  # networks this small gain nothing from a second thread


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def log_of_one_test():
    """The console and the file that a run opens for its log are closed when the test ends."""
    yield
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()


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


@pytest.fixture(scope="session")
def learning_set(tiny_set) -> dict:
    """Config section of a generated set from which a small network learns in six epochs: 48 x 24 pixels."""
    return {
        **tiny_set,
        "TRAIN_IDENTITIES": 24,
        "TRAIN_IMAGES": 288,
        "TEST_IDENTITIES": 16,
        "QUERY_IMAGES": 32,
        "GALLERY_IMAGES": 160,
        "DISTRACTORS": 20,
        "DIFFICULTY": 0.4,
        "CAMERA_BIAS": 0.3,
        "SIZE": [48, 24],
    }


@pytest.fixture(scope="session")
def shrink() -> Callable[..., list[str]]:
    """Overrides that leave the method of a config as it is and make everything around it small."""

    def overrides(config: str | Path, section: dict, batch: int, **more: object) -> list[str]:
        """
        Args:
            config: YAML file.
            section: generated set to train and to test on, such as `tiny_set`.
            batch: images of the target, and of the sources, in a step.
            more: further keys, with two underscores for each full stop.
        """
        from fastreid_uns.config import load_config

        cfg = load_config(config)
        sampler = cfg.DATALOADER.SAMPLER
        values: dict[str, object] = {
            **{f"DATASETS.TESTS.{name}": None for name in cfg.DATASETS.TESTS},
            "DATASETS.TRAIN": section,
            "DATASETS.TESTS.synthetic": section,
            "INPUT.SIZE": section["SIZE"],
            "DATALOADER.WORKERS": 0,
            "DATALOADER.SAMPLER.BATCH_SIZE": batch,
            "MODEL.WEIGHTS": "",
            "MODEL.DEVICE": "cpu",
            "SOLVER.AMP": "none",
            "TEST.PERIOD": 0,
            "LOG.WRITERS": ["json"],
        }
        if cfg.DATASETS.SOURCES:
            values["DATALOADER.SOURCE_SAMPLER.BATCH_SIZE"] = batch
        for name, source in cfg.DATASETS.SOURCES.items():
            values[f"DATASETS.SOURCES.{name}"] = {**section, "SEED": source.SEED}
        if "CLUSTERS" in sampler:
            values["DATALOADER.SAMPLER.CLUSTERS"] = max(2, sampler.CLUSTERS * batch // sampler.BATCH_SIZE)
        for name in cfg.INPUT.AUGMENTS:
            values |= {f"INPUT.AUGMENTS.{name}.PAD": 2, f"INPUT.AUGMENTS.{name}.ERASE": 0.0}
        few_images = {"K1": 12, "K2": 3, "MIN_SAMPLES": 2, "NUM_CLUSTERS": 24}
        values |= {f"PSEUDO_LABELS.{key}": value for key, value in few_images.items() if key in cfg.PSEUDO_LABELS}
        values |= {key.replace("__", "."): value for key, value in more.items()}
        return [f"{key}={json.dumps(value)}" for key, value in values.items()]

    return overrides


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


WORKER = """
import sys, torch
from pathlib import Path
from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.recluster import ReclusterHook
from fastreid_uns.utils import comm

torch.set_num_threads(1)
trainer = DefaultTrainer(load_config(sys.argv[2], sys.argv[3:]))
trainer.train()
labels = trainer.hook(ReclusterHook).pseudo.labels
state = {"model": trainer.model.state_dict(), "labels": labels, "results": trainer.results}
torch.save(state, Path(sys.argv[1]) / f"rank{comm.rank()}.pth")
"""


@pytest.fixture
def launch() -> Callable[..., list[dict]]:
    """Trains in a number of gloo processes; gives weights, labels and results of each rank."""

    def train(processes: int, folder: Path, overrides: list[str], config: str | Path = "") -> list[dict]:
        folder.mkdir()
        script = folder / "worker.py"
        script.write_text(WORKER)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run(
            [*command, str(script), str(folder), str(config), *overrides, f"OUTPUT_DIR={folder / 'run'}"],
            capture_output=True,
            text=True,
            timeout=300,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return [torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in range(processes)]

    return train
