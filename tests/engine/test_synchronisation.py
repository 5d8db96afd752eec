"""The host gives the device its work and never waits for it within an epoch."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer

# sizes or values that the host must know before it can go on
WAITING = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
}
RECIPES = {
    "cluster memory": {},
    "hardest image": {"MODEL.MEMORY.HARD": True},
    "instance memory": {"MODEL.MEMORY.NAME": "InstanceMemory", "MODEL.LOSSES.contrast": None},
    "momentum encoder": {"MODEL.MOMENTUM_ENCODER": True},
    "bfloat16, clipped, in parts": {
        "SOLVER.AMP": "bfloat16",
        "SOLVER.CLIP_NORM": 1.0,
        "SOLVER.ACCUMULATE": 2,
        "MODEL.BACKBONE.LAST_STRIDE": 1,  # on AMX torch is wrong where a map of width 2 becomes 1
    },
    "norm groups": {"MODEL.GHOST_BATCH": 8},
    "layer-wise rates": {"SOLVER.OPTIMIZER": "lars"},
    "labelled source": {
        "MODEL.DOMAIN_BN": True,
        "MODEL.MEMORY.NAME": "InstanceMemory",
        "MODEL.LOSSES.contrast": None,
    },
}


class Waits(TorchDispatchMode):
    """Operations that would make the host wait if the tensors were on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else ()
        if name in WAITING or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def trainer(tiny, tiny_set, request) -> DefaultTrainer:
    """Before the first batch of its first epoch, on the device of the parameter."""
    name, device = request.param
    recipe = {"MODEL.LOSSES.triplet": {"NAME": "SoftTripletLoss"}, **RECIPES[name], "MODEL.DEVICE": device}
    if name == "labelled source":
        recipe["DATASETS.SOURCES.drawn"] = {**tiny_set, "SEED": 5}
        recipe["DATALOADER.SOURCE_SAMPLER"] = {"NAME": "ClusterSampler", "BATCH_SIZE": 16, "NUM_INSTANCES": 4}
    overrides = [f"{key}={json.dumps(value)}" for key, value in recipe.items()]
    labels = ["PSEUDO_LABELS.MIN_SAMPLES=2", "PSEUDO_LABELS.K1=8", "LOG.PERIOD_STEPS=0", "DATALOADER.CACHE=device"]
    trainer = DefaultTrainer(load_config(overrides=[*tiny, *labels, *overrides]))
    trainer._call("before_train")
    trainer._call("before_epoch")
    trainer.model.train()
    return trainer


def test_the_count_sees_what_waits():
    value, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    with Waits() as waits:
        float(value.sum())
        value[mask]
        value[mask] = torch.zeros(2)
        value[value.long()]
        mask.nonzero()
    assert waits.found == ["_local_scalar_dense", "index", "index_put_", "nonzero"]


@pytest.mark.parametrize("trainer", [(name, "cpu") for name in RECIPES], indirect=True, ids=list(RECIPES))
def test_a_step_holds_nothing_that_waits(trainer):
    batch = next(trainer.train_loader.epoch(0))
    with Waits() as waits:
        trainer.step(batch)
        trainer._call("after_step")
    assert waits.found == []


@pytest.mark.gpu
@pytest.mark.parametrize("trainer", [(name, "cuda") for name in RECIPES], indirect=True, ids=list(RECIPES))
def test_no_batch_and_no_step_waits_for_the_gpu(trainer):
    """The first step may: libraries measure kernels and allocate in it."""
    batches = trainer.train_loader.epoch(0)
    trainer.step(next(batches))
    waited = ""
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(next(batches))
        trainer._call("after_step")
    except RuntimeError as error:
        waited = str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waited == ""
