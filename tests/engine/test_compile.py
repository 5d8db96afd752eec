"""`SOLVER.COMPILE`: one graph for each way in which an encoder is used, and none after the second epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.hook import HookBase
from fastreid_uns.modeling.encoder import Encoder, compile_encoders
from fastreid_uns.modeling.norm import ghost_batch_norm
from fastreid_uns.registry import BACKBONE_REGISTRY, HEAD_REGISTRY

ROOT = Path(__file__).parents[2]
PROJECTS = sorted(path.parents[1].name for path in ROOT.glob("projects/*/configs/synthetic.yaml"))


class GraphsHook(HookBase):
    """Counts the graphs that torch makes, epoch by epoch, as its backend."""

    order = 99

    def __init__(self) -> None:
        self.count = 0
        self.after: list[int] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        self.count += 1
        return graph.forward

    def after_epoch(self) -> None:
        self.after.append(self.count)


@pytest.fixture
def graphs():
    torch._dynamo.reset()
    yield GraphsHook()
    torch._dynamo.reset()


def run(config: Path | None, overrides: list[str], graphs: GraphsHook) -> DefaultTrainer:
    """A run whose encoders are compiled; a graph that breaks is an error."""
    trainer = DefaultTrainer(load_config(config, overrides))
    trainer.add_hook(graphs)
    compile_encoders(trainer.model, backend=graphs, fullgraph=True)
    trainer.train()
    return trainer


def test_no_graph_breaks_and_none_is_made_after_the_second_epoch(tiny, graphs):
    """Training, extraction and evaluation of 96 and 48 images in batches of 20: the last one is smaller."""
    keys = ["MODEL.GHOST_BATCH=8", "TEST.BATCH_SIZE=20", "TEST.PERIOD=1", "SOLVER.EPOCHS=3", "SOLVER.AMP=bfloat16"]
    keys += ["PSEUDO_LABELS.MIN_SAMPLES=2", "PSEUDO_LABELS.K1=8", "MODEL.BACKBONE.LAST_STRIDE=1"]
    run(None, [*tiny, *keys], graphs)
    assert graphs.after[1:] == [graphs.after[0]] * 2
    assert graphs.after[0] >= 3  # a step, a batch of images to extract, the smaller one


@pytest.mark.parametrize(
    ("backbone", "head"),
    [
        pytest.param({"NAME": "torchvision", "MODEL": "resnet18"}, {"POOLING": "gem"}, id="ResNet-18"),
        pytest.param({"NAME": "ResNetIBN", "DEPTH": 18}, {"NAME": "PartHead", "PARTS": 2}, id="ResNet-18-IBN, parts"),
        pytest.param({"NAME": "OSNet", "WIDTH": 0.25}, {"DIM": 16}, id="OSNet"),
        pytest.param({"NAME": "timm", "MODEL": "resnet10t"}, {"NECK": "none"}, id="timm"),
        pytest.param(
            {"NAME": "ViT", "WIDTH": 48, "HEADS": 3, "DEPTH": 2, "PART_TOKENS": 2, "DROP_PATH": 0.1, "CONV_STEM": True},
            {"NAME": "TokenHead"},
            id="ViT",
        ),
    ],
)
def test_an_encoder_is_one_graph_for_each_use_and_size(backbone, head, graphs):
    """Training with shared norm statistics, evaluation of whole batches, and of a last one."""
    size = (64, 32)
    network = BACKBONE_REGISTRY.build(backbone, size)
    made = HEAD_REGISTRY.build({"NAME": "EmbeddingHead", **head}, network.out_channels)
    encoder = ghost_batch_norm(Encoder(network, made, mean=[0.5] * 3, std=[0.5] * 3), 4)
    compile_encoders(encoder, backend=graphs, fullgraph=True)
    for _ in range(3):
        encoder.train()(torch.rand(8, 3, *size)).feats.sum().backward()
        with torch.no_grad():
            encoder.eval()(torch.zeros(8, 3, *size, dtype=torch.uint8))
            encoder(torch.zeros(3, 3, *size, dtype=torch.uint8))
        assert graphs.count == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", PROJECTS)
def test_no_graph_of_a_project_breaks(name, shrink, tiny_set, tmp_path, graphs):
    small = {"SOLVER__EPOCHS": 3, "SOLVER__ITERS_PER_EPOCH": 2, "TEST__PERIOD": 1, "TEST__BATCH_SIZE": 20}
    config = ROOT / "projects" / name / "configs/synthetic.yaml"
    run(config, shrink(config, tiny_set, 16, **small, OUTPUT_DIR=str(tmp_path / "run")), graphs)
    assert graphs.after[2] == graphs.after[1]


def test_the_key_compiles_the_encoders(tiny):
    trainer = DefaultTrainer(load_config(None, [*tiny, "SOLVER.COMPILE=true", "MODEL.MOMENTUM_ENCODER=true"]))
    encoders = [module for module in trainer.model.modules() if isinstance(module, Encoder)]
    assert len(encoders) == 2
    assert all(encoder._compiled_call_impl is not None for encoder in encoders)


@pytest.mark.gpu
def test_a_compiled_run_on_a_gpu_has_the_losses_of_a_plain_one_and_never_waits(tiny):
    pytest.importorskip("triton")
    keys = ["MODEL.DEVICE=cuda", "MODEL.GHOST_BATCH=8", "SOLVER.EPOCHS=1", "DATALOADER.CACHE=device"]
    keys += ["PSEUDO_LABELS.MIN_SAMPLES=2", "PSEUDO_LABELS.K1=8", "LOG.PERIOD_STEPS=0"]
    losses = []
    for compiled in ("false", "true"):
        trainer = DefaultTrainer(load_config(None, [*tiny, *keys, f"SOLVER.COMPILE={compiled}"]))
        trainer._call("before_train")
        trainer._call("before_epoch")
        trainer.model.train()
        first, second = trainer.train_loader.epoch(0)
        trainer.step(first)
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step(second)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(trainer.last["loss"].item())
        trainer.run.release()
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
