"""Images a second of a training step and of extraction, on random pixels that are on the device already.

Forms: `plain`, the loop of the papers' code in float32 (memory updated image by image, batches as they come); `ours`,
the package with its defaults; `float32`, `deterministic` and `compile`, the same with one key changed; `extract`, the
features of a trained network; any other is the folder of a project, whose `configs/market.yaml` is taken.
"""

from __future__ import annotations

import json
import time
from typing import Any

import measuring

IMAGES, PER_CLUSTER = 512, 8  # of the generated set that the trainer is built on; only its size matters
KEYS = {
    "float32": {"SOLVER.AMP": "none"},
    "deterministic": {"DETERMINISTIC": True},
    "compile": {"SOLVER.COMPILE": True},
}


def cases(size: str) -> list[measuring.Case]:
    if size == "small":
        small = {"device": "cpu", "backbone": "resnet18", "batch": 8, "size": [64, 32], "steps": 1}
        return [{"form": form, **small} for form in ("plain", "ours", "deterministic", "extract")]
    cpu = {"device": "cpu", "batch": 32, "size": [256, 128], "steps": 5}
    forms = [("resnet50", form) for form in ("plain", "ours", "float32", "deterministic", "compile", "extract", "ACFL")]
    forms += [("resnet18", form) for form in ("plain", "ours")]
    found = [{"form": form, "backbone": backbone, **cpu} for backbone, form in forms]
    cuda = {"device": "cuda", "backbone": "resnet50", "batch": 256, "size": [256, 128], "steps": 30}
    return found + [{"form": form, **cuda} for _, form in forms[:7]]


def build(form: str, device: str, backbone: str, batch: int, size: list[int]):
    """A trainer of the package after its first clustering, and a batch."""
    import torch

    from fastreid_uns.config import load_config
    from fastreid_uns.engine.default import DefaultTrainer
    from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels

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
        "OUTPUT_DIR": str(measuring.FOLDER / "step"),
        **KEYS.get(form, {}),
    }
    cfg = load_config(measuring.ROOT / base, [f"{key}={json.dumps(value)}" for key, value in keys.items()])
    trainer = DefaultTrainer(cfg)
    labels = torch.arange(IMAGES) // PER_CLUSTER
    feats = torch.nn.functional.normalize(torch.randn(IMAGES, trainer.model.encoder.dim))
    cameras = torch.zeros(IMAGES, dtype=torch.int64)
    centroids = torch.nn.functional.normalize(feats.view(-1, PER_CLUSTER, feats.shape[1]).mean(1))
    bank = FeatureBank(feats.to(device), cameras)
    pseudo = PseudoLabels(labels, centroids)
    trainer.model.update_memory(pseudo.to(device), bank)
    index = torch.arange(batch)
    views = tuple(torch.rand(batch, 3, *size) for _ in cfg.INPUT.VIEWS)
    drawn = Batch(views, index, labels[:batch], cameras[:batch], cameras[:batch], PER_CLUSTER)
    return trainer, drawn.to(torch.device(device))


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
    """Images a second, the best and the median of the steps after two that are not counted, and the peak of memory."""
    import statistics

    import torch

    from fastreid_uns.evaluation.extract import evaluation_mode

    trainer, images = build(form, device, backbone, batch, size)
    if form == "plain":
        run = plain_step(trainer, images)
    elif form == "extract":
        pixels = (images.views[0] * 255).to(torch.uint8)

        def run() -> None:
            with evaluation_mode(trainer.model), torch.autocast(device, trainer.amp, enabled=trainer.amp is not None):
                trainer.model.extract(pixels)
    else:
        trainer.model.train()

        def run() -> None:
            trainer.step(images)

    result: dict[str, Any] = {"precision": "float32" if form == "plain" else str(trainer.amp or "float32")}
    seconds = []
    with measuring.measured(result):
        for _ in range(2):
            run()
        for _ in range(steps):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            seconds.append(time.perf_counter() - start)
    if device == "cuda":
        result["device_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {
        **result,
        "images_per_second": batch / statistics.median(seconds),
        "best_images_per_second": batch / min(seconds),
        "step_seconds": [round(value, 4) for value in seconds],
    }


def _wait(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    measuring.main(__doc__, __file__, cases, measure)
