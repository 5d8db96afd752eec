"""From a config to a trainer; override one builder and keep the rest."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from fastreid_uns.config import deviations
from fastreid_uns.data import build as data
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.loader import TrainLoader
from fastreid_uns.data.train_set import TrainSet
from fastreid_uns.engine.hooks import (
    CheckpointHook,
    EvaluateHook,
    LogHook,
    MomentumEncoderHook,
    ScheduleHook,
)
from fastreid_uns.engine.log import build_writers
from fastreid_uns.engine.recluster import ReclusterHook
from fastreid_uns.engine.solver import build_optimizer, build_schedule, precision
from fastreid_uns.engine.trainer import Trainer
from fastreid_uns.evaluation.evaluator import Evaluator
from fastreid_uns.hook import HookBase
from fastreid_uns.modeling.encoder import Encoder
from fastreid_uns.modeling.meta_arch import MetaArch, build_model, check_domains
from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator
from fastreid_uns.registry import HOOK_REGISTRY, PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import ReIDData
from fastreid_uns.utils import comm
from fastreid_uns.utils.allocator import raise_malloc_thresholds
from fastreid_uns.utils.environment import environment
from fastreid_uns.utils.seed import seed_everything

logger = logging.getLogger(__name__)


class DefaultTrainer(Trainer):
    """The trainer of a config.

    Args:
        cfg: a complete config, see `config.load_config`.

    Raises:
        ValueError, FileNotFoundError, KeyError, RuntimeError: before the first step, with the key to change.
    """

    train_loader: TrainLoader
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
        self.train_set = self.build_train_set(cfg, device)
        model = self.build_model(cfg, self.train_set.num_images).to(device)
        if cfg.SOLVER.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        if cfg.SOLVER.COMPILE:
            for module in model.modules():
                if isinstance(module, Encoder):
                    module.compile()
        super().__init__(
            model,
            self.build_train_loader(cfg, self.train_set, device),
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
    def build_train_set(cls, cfg: Any, device: torch.device) -> TrainSet:
        """The training images, see `data.build.build_train_set`."""
        check_domains(cfg)
        return data.build_train_set(cfg, device)

    @classmethod
    def build_model(cls, cfg: Any, num_images: int) -> MetaArch:
        """The model on the CPU, with its starting weights."""
        return build_model(cfg, num_images)

    @classmethod
    def build_train_loader(cls, cfg: Any, train_set: TrainSet, device: torch.device) -> TrainLoader:
        """The batches of training, see `data.build.build_train_loader`."""
        return data.build_train_loader(cfg, train_set, device)

    @classmethod
    def build_test_loader(cls, cfg: Any, name: str, device: torch.device) -> tuple[ReIDData, ImageSet]:
        """One of `DATASETS.TESTS` and its images, see `data.build.build_test_loader`."""
        return data.build_test_loader(cfg, name, device)

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
        return {
            name: Evaluator(
                *cls.build_test_loader(cfg, name, device),
                rerank=cfg.TEST.RERANK,
                batch_size=cfg.TEST.BATCH_SIZE,
                amp=precision(cfg.SOLVER.AMP, device),
            )
            for name in cfg.DATASETS.TESTS
        }

    @classmethod
    def build_hooks(cls, cfg: Any, trainer: DefaultTrainer) -> list[HookBase]:
        """The hooks of the core, then those of `HOOKS`."""
        evaluate = EvaluateHook(
            cls.build_evaluators(cfg, trainer.device), period=cfg.TEST.PERIOD, patience=cfg.TEST.PATIENCE
        )
        hooks: list[HookBase] = [
            ReclusterHook(
                cls.build_generator(cfg),
                trainer.train_loader,
                batch_size=cfg.TEST.BATCH_SIZE,
                measure=cfg.LOG.CLUSTER_QUALITY,
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
