"""Images a second of a training step and of extraction, on random pixels that are on the device already.

Forms: `plain`, the loop of the papers' code in float32 (memory updated image by image, batches as they come); `ours`,
the package with its defaults; `float32`, `deterministic` and `compile`, the same with one key changed; `fed`, the same
with batches that the loader makes of images on the device; `extract`, the features of a trained network; any other is
the folder of a project, whose `configs/market.yaml` is taken. A form with `:compile` has that key as well;
`compile:NAME` is another way to compile, see `COMPILERS`.

Cases of a GPU prepare and compile beside each other and are measured one after the other.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import measuring

IMAGES, PER_CLUSTER = 512, 8  # of the generated set that the trainer is built on; only its size matters
KEYS = {
    "float32": {"SOLVER.AMP": "none"},
    "deterministic": {"DETERMINISTIC": True},
    "compile": {"SOLVER.COMPILE": True},
    "fed": {"DATALOADER.CACHE": "device"},
}
COMPILERS = {  # options of torch.compile; `blocks` compiles each residual block and the head, and equal blocks once
    "blocks": {},
    "graphs": {"mode": "reduce-overhead"},
    "tuned": {"options": {"coordinate_descent_tuning": True}},
    "max": {"mode": "max-autotune-no-cudagraphs"},
}
CUDA_FORMS = ["plain", "ours", "float32", "deterministic", "fed", "extract", "ACFL", "compile"]
CUDA_FORMS += [*(f"compile:{name}" for name in COMPILERS), "fed:compile", "extract:compile", "ACFL:compile"]
ROUND = 10  # steps of a GPU between two looks at the clock: it is given its work ahead, as in training


def cases(size: str) -> list[measuring.Case]:
    if size == "small":
        small = {"device": "cpu", "backbone": "resnet18", "batch": 8, "size": [64, 32], "steps": 1}
        return [{"form": form, **small} for form in ("plain", "ours", "deterministic", "fed", "extract")]
    cpu = {"device": "cpu", "batch": 32, "size": [256, 128], "steps": 5}
    forms = [("resnet50", form) for form in ("plain", "ours", "float32", "deterministic", "compile", "extract", "ACFL")]
    forms += [("resnet18", form) for form in ("plain", "ours")]
    found = [{"form": form, "backbone": backbone, **cpu} for backbone, form in forms]
    cuda = {"device": "cuda", "backbone": "resnet50", "batch": 256, "size": [256, 128], "steps": 40}
    return found + [{"form": form, **cuda} for form in CUDA_FORMS]


def build(form: str, device: str, backbone: str, batch: int, size: list[int], **keys: Any):
    """A trainer of the package after its first clustering, and a batch.

    Args:
        keys: of the config, beside those of the form.
    """
    import torch

    from fastreid_uns.config import load_config
    from fastreid_uns.engine.default import DefaultTrainer
    from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels

    form, _, compiler = form.partition(":")
    project = form not in (*KEYS, "plain", "ours", "extract")
    base = f"projects/{form}/configs/market.yaml" if project else "configs/base.yaml"
    images = {
        "NAME": "synthetic",
        "ROOT": str(measuring.FOLDER / "synthetic_step"),
        "TRAIN_IDENTITIES": IMAGES // PER_CLUSTER,
        "TRAIN_IMAGES": IMAGES,
        "TEST_IDENTITIES": 8,
        "QUERY_IMAGES": 8,
        "GALLERY_IMAGES": 32,
        "DISTRACTORS": 2,
        "JUNK": 2,
        "SIZE": [32, 16],
    }
    if form == "compile" and compiler:
        form = "ours"
    keys = {
        "DATASETS.TRAIN": images,
        "DATASETS.TESTS.market1501": None,
        "INPUT.SIZE": size,
        "MODEL.DEVICE": device,
        "MODEL.WEIGHTS": "",
        "MODEL.BACKBONE.MODEL": backbone,
        "MODEL.GHOST_BATCH": min(64, batch),
        "DATALOADER.CACHE": "none",
        "DATALOADER.SAMPLER.BATCH_SIZE": batch,
        "DATALOADER.SAMPLER.NUM_INSTANCES": PER_CLUSTER,
        "LOG.WRITERS": [],
        "OUTPUT_DIR": str(measuring.FOLDER / f"step-{os.getpid()}"),
        **KEYS.get(form, {}),
        **(KEYS["compile"] if compiler == "compile" else {}),
        **keys,
    }
    cfg = load_config(measuring.ROOT / base, [f"{key}={json.dumps(value)}" for key, value in keys.items()])
    trainer = DefaultTrainer(cfg)
    if compiler in COMPILERS:
        compile_as(compiler, trainer.model)
    labels = torch.arange(IMAGES) // PER_CLUSTER
    feats = torch.nn.functional.normalize(torch.randn(IMAGES, trainer.model.encoder.dim))
    cameras = torch.zeros(IMAGES, dtype=torch.int64)
    centroids = torch.nn.functional.normalize(feats.view(-1, PER_CLUSTER, feats.shape[1]).mean(1))
    bank = FeatureBank(feats.to(device), cameras)
    pseudo = PseudoLabels(labels, centroids)
    trainer.model.update_memory(pseudo.to(device), bank)
    index = torch.arange(batch) % IMAGES
    views = tuple(torch.rand(batch, 3, *size) for _ in cfg.INPUT.VIEWS)
    most = PER_CLUSTER * -(-batch // IMAGES)
    drawn = Batch(views, index, labels[index], cameras[index], cameras[index], most)
    return trainer, drawn.to(torch.device(device))


def compile_as(compiler: str, model: Any) -> None:
    """Compile the encoders in one of the other ways."""
    import torch

    from fastreid_uns.modeling.encoder import compile_encoders

    if compiler != "blocks":
        compile_encoders(model, **COMPILERS[compiler])
        return
    torch._dynamo.config.recompile_limit = 64  # all blocks of a network have one code
    backbone = model.encoder.backbone
    for stage in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        for block in stage:
            block.compile(dynamic=False)
    model.encoder.head.compile(dynamic=False)


def plain_step(trainer, batch):
    """One step as the papers' code makes it, on the same model: a function that does nothing else."""
    import torch
    import torch.nn.functional as F

    encoder = trainer.model.encoder.to(memory_format=torch.contiguous_format).train()
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3.5e-4, weight_decay=5e-4)
    memory = trainer.model.memory.features.clone()

    def step() -> None:
        feats = encoder(batch.views[0]).feats
        loss = F.cross_entropy(feats @ memory.T / 0.05, batch.labels)
        optimizer.zero_grad()
        loss.backward()
        for feat, label in zip(feats.detach(), batch.labels, strict=True):
            memory[label] = F.normalize(0.1 * memory[label] + 0.9 * feat, dim=0)
        optimizer.step()
        loss.item()  # the papers' code logs it in every step

    return step


def measure(form: str, device: str, backbone: str, batch: int, size: list[int], steps: int) -> dict[str, Any]:
    """Images a second, the best and the median of the rounds, and the peak of memory."""
    import statistics

    import torch

    start = time.perf_counter()
    with measuring.beside_others():
        trainer, images = build(form, device, backbone, batch, size)
        run = step_of(form, trainer, images)
        torch.backends.cudnn.allow_tf32 = False  # kernels chosen beside others are not those of the measurement
        for _ in range(2):
            run()
        _wait(device)
    result: dict[str, Any] = {"precision": "float32" if form == "plain" else str(trainer.amp or "float32")}
    result["seconds_before"] = time.perf_counter() - start  # of the start, of compiling, of the first two steps
    torch.backends.cudnn.allow_tf32 = True
    together = min(ROUND, steps) if device == "cuda" else 1
    seconds = []
    with measuring.alone():
        for _ in range(2):
            run()
        _wait(device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with measuring.measured(result):
            for _ in range(steps // together):
                start = time.perf_counter()
                for _ in range(together):
                    run()
                _wait(device)
                seconds.append((time.perf_counter() - start) / together)
    if device == "cuda":
        result["device_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {
        **result,
        "images_per_second": batch / statistics.median(seconds),
        "best_images_per_second": batch / min(seconds),
        "step_seconds": [round(value, 4) for value in seconds],
    }


def step_of(form: str, trainer: Any, images: Any) -> Callable[[], None]:
    """What is measured, once."""
    import torch

    from fastreid_uns.evaluation.extract import evaluation_mode

    if form == "plain":
        return plain_step(trainer, images)
    kind = form.partition(":")[0]
    if kind != "extract":
        trainer.model.train()
        batches = batches_of(trainer) if kind == "fed" else itertools.repeat(images)
        return lambda: trainer.step(next(batches))
    pixels = (images.views[0] * 255).to(torch.uint8)

    def extract() -> None:
        place = trainer.device.type
        with evaluation_mode(trainer.model), torch.autocast(place, trainer.amp, enabled=trainer.amp is not None):
            trainer.model.extract(pixels)

    return extract


def batches_of(trainer: Any) -> Iterator[Any]:
    """The batches of one epoch after the other, as in training."""
    import torch

    from fastreid_uns.structures import PseudoLabels

    loader, labels = trainer.train_loader, torch.arange(IMAGES) // PER_CLUSTER
    loader.train_set.pseudo = PseudoLabels(labels, torch.zeros(IMAGES // PER_CLUSTER, 1))
    for epoch in itertools.count():
        loader.plan(epoch)
        yield from loader.epoch(epoch)


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    measuring.main(__doc__, __file__, cases, measure)
