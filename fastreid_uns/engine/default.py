"""From a config to a trainer; override one builder and keep the rest."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastreid_uns.config import deviations
from fastreid_uns.data.camera_style import KINDS, CameraStyle, ColourStyle, GeneratedStyle, generated_images
from fastreid_uns.data.feed import Feed
from fastreid_uns.data.image_set import CachedImageSet, ImageSet, check_images
from fastreid_uns.data.samplers import JointSampler
from fastreid_uns.engine.agreement import AgreementHook
from fastreid_uns.engine.hooks import (
    CheckpointHook,
    EvaluateHook,
    LogHook,
    MomentumEncoderHook,
    ReclusterHook,
    ScheduleHook,
)
from fastreid_uns.engine.log import build_writers
from fastreid_uns.engine.solver import build_optimizer, build_schedule, precision
from fastreid_uns.engine.trainer import Trainer
from fastreid_uns.errors import InvalidValue, UnknownName
from fastreid_uns.evaluation.evaluator import Evaluator
from fastreid_uns.hook import HookBase
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.meta_arch import MetaArch, build_model, check_domains
from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator
from fastreid_uns.registry import (
    AUGMENT_REGISTRY,
    DATASET_REGISTRY,
    HOOK_REGISTRY,
    PSEUDO_LABEL_REGISTRY,
    SAMPLER_REGISTRY,
)
from fastreid_uns.structures import Record
from fastreid_uns.utils import comm
from fastreid_uns.utils.allocator import raise_malloc_thresholds
from fastreid_uns.utils.environment import environment
from fastreid_uns.utils.seed import seed_everything

logger = logging.getLogger(__name__)


class TrainData(NamedTuple):
    """The images of a run: N unlabelled ones, and S of the labelled source sets."""

    target: list[Record]
    source: list[Record]
    source_labels: Tensor  # (S,) classes 0..C-1, counted over all source sets
    source_domains: Tensor  # (S,) 1.. for each set


class DefaultTrainer(Trainer):
    """The trainer of a config.

    Args:
        cfg: a complete config, see `config.load_config`.

    Raises:
        ValueError, FileNotFoundError, KeyError, RuntimeError: before the first step, with the key to change.
    """

    feed: Feed
    folder: Path

    def __init__(self, cfg: Any) -> None:
        device = comm.init_from_environment(cfg.MODEL.DEVICE)
        if device.type == "cpu":
            raise_malloc_thresholds()
        self.cfg = cfg
        self.folder = Path(cfg.OUTPUT_DIR)
        if comm.rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(cfg.dump(), encoding="utf-8")
            lines = [f"{name}: {value}\n" for name, value in environment(device).items()]
            (self.folder / "environment.txt").write_text("".join(lines), encoding="utf-8")
        seed_everything(cfg.SEED, cfg.DETERMINISTIC)
        self.data = self.build_data(cfg)
        model = self.build_model(cfg, len(self.data.target)).to(device)
        if cfg.SOLVER.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        if cfg.SOLVER.COMPILE:
            for module in model.modules():
                if isinstance(module, Encoder):
                    module.compile()
        feed = self.build_feed(cfg, self.data, device)
        super().__init__(
            model,
            feed,
            self.build_optimizer(cfg, model),
            epochs=cfg.SOLVER.EPOCHS,
            iters_per_epoch=cfg.SOLVER.ITERS_PER_EPOCH,
            amp=precision(cfg.SOLVER.AMP, device),
            clip=cfg.SOLVER.CLIP_NORM or None,
            accumulate=cfg.SOLVER.ACCUMULATE,
            channels_last=cfg.SOLVER.CHANNELS_LAST,
            find_unused=cfg.SOLVER.FIND_UNUSED,
        )
        for hook in self.build_hooks(cfg, self):
            self.add_hook(hook)
        if cfg.PAPER:
            logger.info("Departures from the paper's settings: %s", "; ".join(deviations(cfg)) or "none")
        seed_everything(cfg.SEED + comm.rank(), cfg.DETERMINISTIC)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info(
            "%s on %s, precision %s, %s trainable parameters, %d images a step in norm groups of %d",
            type(model).__name__,
            device,
            self.amp or torch.float32,
            f"{count:,}",
            cfg.DATALOADER.SAMPLER.get("BATCH_SIZE", 0),
            cfg.MODEL.GHOST_BATCH or cfg.DATALOADER.SAMPLER.get("BATCH_SIZE", 0) // comm.world(),
        )

    @classmethod
    def build_data(cls, cfg: Any) -> TrainData:
        """Read the training sets; only source sets keep their identities.

        Raises:
            ValueError: no training set is named, it has fewer than two images, or a source set is missing.
        """
        check_domains(cfg)
        if not cfg.DATASETS.TRAIN.NAME:
            raise InvalidValue("DATASETS.TRAIN has no NAME; name a data set, such as {NAME: folder, ROOT: my/images}.")
        target = DATASET_REGISTRY.build(cfg.DATASETS.TRAIN).train
        target = check_images(target, on_bad=cfg.INPUT.ON_BAD_IMAGE, what="DATASETS.TRAIN")
        if len(target) < 2:
            raise InvalidValue(
                f"DATASETS.TRAIN: {cfg.DATASETS.TRAIN.NAME} has {len(target)} training image(s); clustering needs at "
                f"least two. Check its ROOT."
            )
        source: list[Record] = []
        labels: list[int] = []
        domains: list[int] = []
        for domain, (name, section) in enumerate(cfg.DATASETS.SOURCES.items(), start=1):
            what = f"DATASETS.SOURCES.{name}"
            records = check_images(DATASET_REGISTRY.build(section).train, on_bad=cfg.INPUT.ON_BAD_IMAGE, what=what)
            if any(record.identity < 0 for record in records):
                raise InvalidValue(f"{what} has images without identity; a source set must be labelled throughout.")
            classes = {
                identity: len(set(labels)) + i for i, identity in enumerate(sorted({r.identity for r in records}))
            }
            labels += [classes[record.identity] for record in records]
            domains += [domain] * len(records)
            source += records
        logger.info("%s training images, %s of labelled sources", f"{len(target):,}", f"{len(source):,}")
        return TrainData(target, source, torch.tensor(labels, dtype=torch.int64), torch.tensor(domains))

    @classmethod
    def build_model(cls, cfg: Any, num_images: int) -> MetaArch:
        """The model on the CPU, with its starting weights."""
        return build_model(cfg, num_images)

    @classmethod
    def build_feed(cls, cfg: Any, data: TrainData, device: torch.device) -> Feed:
        """Images, sampler and augmentation of training."""
        section = cfg.DATALOADER.SAMPLER
        where = (cfg.SOLVER.ITERS_PER_EPOCH, cfg.SEED, comm.rank(), comm.world())
        sampler = SAMPLER_REGISTRY.build(section, *where)
        if data.source:
            sources = [SAMPLER_REGISTRY.build(cfg.DATALOADER.SOURCE_SAMPLER, *where) for _ in cfg.DATASETS.SOURCES]
            sampler = JointSampler(sampler, sources, data.source_labels, data.source_domains, cameras_of(data.source))
        images = cls.build_images(cfg, [*data.target, *data.source], device, cfg.DATALOADER.FEED)
        augments = {
            name: AUGMENT_REGISTRY.build(preset, cfg.INPUT.MEAN, cfg.INPUT.STD)
            for name, preset in cfg.INPUT.AUGMENTS.items()
        }
        for view in cfg.INPUT.VIEWS:
            if view not in augments:
                raise UnknownName(
                    f"INPUT.VIEWS: {view!r} is no preset of INPUT.AUGMENTS; known: {', '.join(augments)}."
                )
        return Feed(
            images,
            sampler,
            [augments[view] for view in cfg.INPUT.VIEWS],
            seed=cfg.SEED,
            device=device,
            cameras=images.cameras,
            source_labels=data.source_labels if data.source else None,
            source_domains=data.source_domains if data.source else None,
            style=cls.build_camera_style(cfg, data, images, device),
        )

    @classmethod
    def build_camera_style(
        cls, cfg: Any, data: TrainData, images: ImageSet, device: torch.device
    ) -> CameraStyle | None:
        """What shows images as other cameras would; None if no view has `CAMERA_STYLE`.

        Raises:
            ValueError: unknown `INPUT.CAMERA_STYLE.KIND`, or fewer than two cameras.
            FileNotFoundError: generated pictures are missing.
        """
        if not any(cfg.INPUT.AUGMENTS[view].get("CAMERA_STYLE") for view in cfg.INPUT.VIEWS):
            return None
        kind, count = cfg.INPUT.CAMERA_STYLE.KIND, len(data.target)
        if kind == "colors":
            return ColourStyle(images, count, device=device)
        if kind != "images":
            raise InvalidValue(f"INPUT.CAMERA_STYLE.KIND: {kind!r} is unknown; accepted: {', '.join(KINDS)}.")
        found, origins = generated_images(data.target, cfg.INPUT.CAMERA_STYLE.FOLDER)
        good = check_images(found, on_bad=cfg.INPUT.ON_BAD_IMAGE, what="INPUT.CAMERA_STYLE.FOLDER")
        if len(good) < len(found):
            paths = {record.path for record in good}
            origins = origins[[record.path in paths for record in found]]
        return GeneratedStyle(images.cameras, count, cls.build_images(cfg, good, device, cfg.DATALOADER.FEED), origins)

    @classmethod
    def build_images(cls, cfg: Any, records: list[Record], device: torch.device, feed: str) -> ImageSet:
        """An image set that decodes (`loader`) or holds its pixels (`cached`).

        Raises:
            ValueError: unknown `DATALOADER.FEED`.
        """
        images = ImageSet(records, tuple(cfg.INPUT.SIZE), workers=cfg.DATALOADER.WORKERS)
        if feed == "loader":
            return images
        if feed == "cached":
            folder = cfg.DATALOADER.CACHE_DIR or Path(cfg.OUTPUT_DIR) / "cache"
            return CachedImageSet(images, where=cfg.DATALOADER.CACHE, device=device, folder=folder)
        raise InvalidValue(f"DATALOADER.FEED: {feed!r} is unknown; accepted: loader, cached.")

    @classmethod
    def build_optimizer(cls, cfg: Any, model: MetaArch) -> torch.optim.Optimizer:
        """The optimiser of `SOLVER`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_generator(cls, cfg: Any) -> PseudoLabelGenerator:
        """The pseudo-label generator."""
        return PSEUDO_LABEL_REGISTRY.build(cfg.PSEUDO_LABELS)

    @classmethod
    def build_evaluators(cls, cfg: Any, device: torch.device) -> dict[str, Evaluator]:
        """An evaluator for each of `DATASETS.TESTS`, by name."""
        evaluators = {}
        for name, section in cfg.DATASETS.TESTS.items():
            data = DATASET_REGISTRY.build(section)
            if not data.query or not data.gallery:
                raise InvalidValue(
                    f"DATASETS.TESTS.{name}: {section.NAME} has {len(data.query)} query and {len(data.gallery)} "
                    f"gallery images; evaluation needs both. Drop it with `DATASETS.TESTS.{name} null`, or add a split."
                )
            images = cls.build_images(cfg, [*data.query, *data.gallery], device, "loader")
            evaluators[name] = Evaluator(
                data,
                images,
                rerank=cfg.TEST.RERANK,
                batch_size=cfg.TEST.BATCH_SIZE,
                amp=precision(cfg.SOLVER.AMP, device),
            )
        return evaluators

    @classmethod
    def build_hooks(cls, cfg: Any, trainer: DefaultTrainer) -> list[HookBase]:
        """The hooks of the core, then those of `HOOKS`."""
        data = trainer.data
        identities = torch.tensor([record.identity for record in data.target])
        evaluate = EvaluateHook(
            cls.build_evaluators(cfg, trainer.device), period=cfg.TEST.PERIOD, patience=cfg.TEST.PATIENCE
        )
        hooks: list[HookBase] = [
            ReclusterHook(
                cls.build_generator(cfg),
                trainer.feed.images,
                trainer.feed,
                source_labels=data.source_labels if data.source else None,
                batch_size=cfg.TEST.BATCH_SIZE,
                identities=identities if cfg.LOG.CLUSTER_QUALITY and bool((identities >= 0).any()) else None,
            ),
            AgreementHook(
                trainer.feed.images,
                len(data.target),
                batch_size=trainer.feed.sampler.batch_size // comm.world() // cfg.SOLVER.ACCUMULATE,
                pretrained=bool(cfg.MODEL.WEIGHTS),
            ),
            ScheduleHook(build_schedule(cfg, trainer.optimizer)),
            evaluate,
            CheckpointHook(
                trainer.folder,
                cfg.dump(),
                period=cfg.CHECKPOINT.PERIOD,
                keep=cfg.CHECKPOINT.KEEP,
                improved=lambda: evaluate.improved,
            ),
            LogHook(
                build_writers(cfg.LOG.WRITERS, trainer.folder) if comm.rank() == 0 else [], period=cfg.LOG.PERIOD_STEPS
            ),
        ]
        if cfg.MODEL.get("MOMENTUM_ENCODER"):
            hooks.append(MomentumEncoderHook(cfg.MODEL.ENCODER_MOMENTUM))
        for name, section in cfg.HOOKS.items():
            hook = HOOK_REGISTRY.build(section)
            hook.name = name
            hooks.append(hook)
        return hooks

    def hook(self, kind: type[HookBase]) -> Any:
        """The hook of a class, such as the `CheckpointHook`."""
        return next(hook for hook in self._hooks if isinstance(hook, kind))

    def resume(self) -> None:
        """Continue from the newest checkpoint of `OUTPUT_DIR`."""
        self.hook(CheckpointHook).resume()

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """Numbers of the latest evaluation, by test set."""
        return self.hook(EvaluateHook).results

    @classmethod
    def test(cls, cfg: Any, model: MetaArch) -> dict[str, dict[str, float]]:
        """Evaluate a model, which is on its device, on every one of `DATASETS.TESTS`.

        Returns:
            name of the test set → mAP, mINP, rank1, rank5, rank10 in percent.
        """
        evaluators = cls.build_evaluators(cfg, next(model.parameters()).device)
        return {name: evaluate(model) for name, evaluate in evaluators.items()}


def cameras_of(records: list[Record]) -> Tensor:
    """(N,) camera of each record."""
    return torch.tensor([record.camera for record in records], dtype=torch.int64)
