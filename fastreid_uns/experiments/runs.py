"""One run of a comparison and its record: a config, trained with one seed, on true or pseudo labels or not at all."""

from __future__ import annotations

import csv
import gc
import hashlib
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastreid_uns.config import load_config
from fastreid_uns.engine.default import DefaultTrainer
from fastreid_uns.engine.log import setup_logging
from fastreid_uns.engine.recluster import ReclusterHook
from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator, centroids
from fastreid_uns.structures import FeatureBank, PseudoLabels
from fastreid_uns.utils.environment import environment

KINDS = ("untrained", "unsupervised", "supervised")
HELD_OUT_QUERIES = 4  # images of each validation identity, at most half of them


class Job(NamedTuple):
    """A run to be done.

    Attributes:
        config: YAML file, relative to the checkout.
        kind: one of `KINDS`.
        seed: of the run.
        overrides: keys changed in it, `KEY=VALUE`.
        hold_out: share of the training identities to score on instead of the test part; 0 = the test part.
        study: that it belongs to, and its row there.
    """

    config: str
    kind: str
    seed: int
    overrides: tuple[str, ...] = ()
    hold_out: float = 0.0
    study: str = ""
    row: str = ""

    @property
    def key(self) -> tuple:
        """What makes it a run of its own."""
        return self[:5]

    @property
    def name(self) -> str:
        """Of its folder."""
        digest = hashlib.sha256(repr((self.overrides, self.hold_out)).encode()).hexdigest()[:8]
        return f"{'-'.join(Path(self.config).with_suffix('').parts)}-{self.kind}-{self.seed}-{digest}"


class TrueLabels(PseudoLabelGenerator):
    """The true labels, for supervised training; it is not registered, so that no config can name it."""

    def __init__(self, identities: torch.Tensor) -> None:
        super().__init__()
        self.labels = identities.unique(return_inverse=True)[1]

    def __call__(self, bank: FeatureBank, epoch: int) -> PseudoLabels:
        labels = self.labels.to(bank.feats.device)
        return PseudoLabels(labels, centroids(bank.feats, labels))


def planned(configs: Sequence[str], seeds: Sequence[int], kinds: Sequence[str] | None) -> Iterator[Job]:
    """The runs of some configs, one whole seed after the other."""
    for seed in seeds:
        for config in configs:
            for kind in kinds or (["unsupervised"] if of_project(config) else KINDS):
                yield Job(config, kind, seed)


def of_project(config: str) -> bool:
    return config.startswith("projects")


def validation_manifest(manifest: Path, fraction: float, output: Path) -> Path:
    """A manifest of the training images alone, with every n-th identity as query and gallery instead.

    Args:
        manifest: of a `csv_file` set with identities.
        fraction: of the identities to hold out; n is its inverse, rounded.
        output: file to write in an existing folder; its paths start at the folder of `manifest`.
    """
    with manifest.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    images: dict[str, int] = defaultdict(int)
    for row in rows:
        images[row["identity"]] += 1
    validation = set(sorted(images, key=int)[:: round(1 / fraction)])
    seen: dict[str, int] = defaultdict(int)
    for row in rows:
        identity = row["identity"]
        if identity in validation:
            row["split"] = "query" if seen[identity] < min(HELD_OUT_QUERIES, images[identity] // 2) else "gallery"
            seen[identity] += 1
    with output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return output


def validation(config: str, overrides: Sequence[str], fraction: float, folder: Path) -> list[str]:
    """Overrides that put held-out training identities in the place of the test part."""
    cfg = load_config(config, overrides)
    manifest = Path(cfg.DATASETS.TRAIN.PATH)
    file = validation_manifest(manifest, fraction, folder / "validation.csv")
    sections = ["DATASETS.TRAIN", *(f"DATASETS.TESTS.{name}" for name in cfg.DATASETS.TESTS)]
    return [f"{s}.{key}={value}" for s in sections for key, value in (("PATH", file), ("ROOT", manifest.parent))]


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Train one config once and give its record.

    Args:
        job: what to run.
        folder: of all runs. Runs of a study share the pixels that they keep there with `DATALOADER.CACHE disk`.
    """
    if "OMP_NUM_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    start = time.perf_counter()
    output = folder / job.name
    shutil.rmtree(output, ignore_errors=True)  # of a run that was broken off; a whole one has a record
    output.mkdir(parents=True)
    setup_logging(output)
    test = validation(job.config, job.overrides, job.hold_out, output) if job.hold_out else []
    pixels = folder / "cache" / f"{job.study or Path(job.config).stem}-{job.hold_out}"
    places = [f"SEED={job.seed}", f"OUTPUT_DIR={output}", f"DATALOADER.CACHE_DIR={pixels}"]
    cfg = load_config(job.config, [*job.overrides, *test, *places])
    trainer = DefaultTrainer(cfg)
    results = _results(trainer, job.kind)
    return {
        **job._asdict(),
        "results": results,
        "seconds": round(time.perf_counter() - start, 1),
        "environment": environment(trainer.device),
    }


def _results(trainer: DefaultTrainer, kind: str) -> dict[str, dict[str, float]]:
    if kind == "untrained":
        return DefaultTrainer.test(trainer.cfg, trainer.model)
    if kind == "supervised":
        images = trainer.train_set.records[: trainer.train_set.num_images]
        trainer.hook(ReclusterHook).generator = TrueLabels(torch.tensor([record.identity for record in images]))
    trainer.train()
    return trainer.results


def attempt(job: Job, folder: Path) -> dict[str, Any]:
    """The record of a run, or one with an `error` in the place of `results`: one failure must not end the others.

    Memory that is not enough says more about what runs beside it than about the run, which counts as `lost`.
    """
    try:
        return run(job, folder)
    except Exception as error:  # whatever a project raises
        lost = {"lost": True} if isinstance(error, (MemoryError, torch.OutOfMemoryError)) else {}
        return {**job._asdict(), "error": f"{type(error).__name__}: {error}", **lost}
    finally:
        gc.collect()  # trainer and hooks refer to each other; the next run of this process needs their memory
        torch.cuda.empty_cache()  # and so do those of other processes
