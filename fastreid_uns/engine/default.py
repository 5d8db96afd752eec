"""From a config to a trainer; override one builder and keep the rest."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from tabulate import tabulate

from fastreid_uns.config import deviations, refuse_other_config
from fastreid_uns.data import build as data
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.data.loader import TrainLoader
from fastreid_uns.data.train_set import TrainSet
from fastreid_uns.engine.agreement import AgreementHook
from fastreid_uns.engine.hooks import (
    CheckpointHook,
    EvaluateHook,
    LogHook,
    MomentumEncoderHook,
    ResetStateHook,
    ScheduleHook,
)
from fastreid_uns.engine.log import Writer, build_writers, setup_logging
from fastreid_uns.engine.recluster import ReclusterHook
from fastreid_uns.engine.run_folder import RunFolder
from fastreid_uns.engine.solver import build_optimizer, build_schedule, freeze, precision
from fastreid_uns.engine.trainer import Trainer
from fastreid_uns.errors import UserError
from fastreid_uns.evaluation.evaluator import Evaluator
from fastreid_uns.hook import HookBase
from fastreid_uns.modeling.encoder import compile_encoders
from fastreid_uns.modeling.meta_arch import MetaArch, build_model, check_domains
from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator
from fastreid_uns.pseudo_labels.constraints import ConstrainedLabels, Constraints, read_answers
from fastreid_uns.registry import HOOK_REGISTRY, PSEUDO_LABEL_REGISTRY
from fastreid_uns.structures import ReIDData
from fastreid_uns.utils import checkpoint, comm
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
        device = comm.init_from_environment(cfg.MODEL.DEVICE, cfg.DISTRIBUTED.TIMEOUT_MINUTES)
        if device.type == "cpu":
            raise_malloc_thresholds()
        self.cfg = cfg
        self.folder = Path(cfg.OUTPUT_DIR)
        self.run = RunFolder(self.folder)
        self._accepted = False
        made_in = self._open_folder()
        seed_everything(cfg.SEED, cfg.DETERMINISTIC)
        self.train_set = self.build_train_set(cfg, device)
        model = self.build_model(cfg, self.train_set.num_images).to(device)
        freeze(cfg, model)
        if cfg.SOLVER.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        if cfg.SOLVER.COMPILE:
            compile_encoders(model)
        super().__init__(
            model,
            self.build_train_loader(cfg, self.train_set, device),
            self.build_optimizer(cfg, model),
            epochs=cfg.SOLVER.EPOCHS,
            iters_per_epoch=cfg.SOLVER.ITERS_PER_EPOCH,
            amp=precision(made_in if made_in and cfg.SOLVER.AMP == "auto" else cfg.SOLVER.AMP, device),
            clip=cfg.SOLVER.CLIP_NORM or None,
            accumulate=cfg.SOLVER.ACCUMULATE,
            channels_last=cfg.SOLVER.CHANNELS_LAST,
            find_unused=cfg.SOLVER.FIND_UNUSED,
        )
        self.register_hooks(self.build_hooks(cfg, self))
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
    def build_lr_scheduler(cls, cfg: Any, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of `SOLVER`, stepped after every optimiser step, or epoch if `ITERS_PER_EPOCH` is 0."""
        return build_schedule(cfg, optimizer)

    @classmethod
    def build_writers(cls, cfg: Any, folder: Path) -> list[Writer]:
        """The writers of `LOG.WRITERS`; one process writes for all."""
        return build_writers(cfg.LOG.WRITERS, folder) if comm.rank() == 0 else []

    @classmethod
    def build_generator(cls, cfg: Any, train_set: TrainSet) -> PseudoLabelGenerator:
        """The pseudo-label generator, held to the answers of `PSEUDO_LABELS.DECISIONS`."""
        generator = PSEUDO_LABEL_REGISTRY.build(cfg.PSEUDO_LABELS)
        if not cfg.PSEUDO_LABELS.DECISIONS:
            return generator
        paths = [record.path for record in train_set.records[: train_set.num_images]]
        answers = read_answers(cfg.PSEUDO_LABELS.DECISIONS, paths)
        return ConstrainedLabels(generator, Constraints(len(paths), answers))

    @classmethod
    def build_evaluators(cls, cfg: Any, device: torch.device) -> dict[str, Evaluator]:
        """An evaluator for each of `DATASETS.TESTS`, by name.

        Raises:
            ValueError: `TEST.DOMAINS` names what is not there; see also `build_test_loader`.
        """
        domains = data.domains_of_tests(cfg)
        return {
            name: Evaluator(
                *cls.build_test_loader(cfg, name, device),
                rerank=cfg.TEST.RERANK,
                batch_size=cfg.TEST.BATCH_SIZE,
                amp=precision(cfg.SOLVER.AMP, device),
                domain=domains[name],
            )
            for name in cfg.DATASETS.TESTS
        }

    @classmethod
    def build_hooks(cls, cfg: Any, trainer: DefaultTrainer) -> list[HookBase]:
        """The hooks of the core, then those of `HOOKS`."""
        evaluators = cls.build_evaluators(cfg, trainer.device)
        for evaluator in evaluators.values():
            evaluator.amp = trainer.amp
        evaluate = EvaluateHook(evaluators, period=cfg.TEST.PERIOD, patience=cfg.TEST.PATIENCE)
        hooks: list[HookBase] = [
            ReclusterHook(
                cls.build_generator(cfg, trainer.train_set),
                trainer.train_loader,
                batch_size=cfg.TEST.BATCH_SIZE,
                measure=cfg.LOG.CLUSTER_QUALITY,
            ),
            AgreementHook(trainer.train_loader, parts=cfg.SOLVER.ACCUMULATE, pretrained=bool(cfg.MODEL.WEIGHTS)),
            ScheduleHook(cls.build_lr_scheduler(cfg, trainer.optimizer), by_epoch=not cfg.SOLVER.ITERS_PER_EPOCH),
            evaluate,
            CheckpointHook(
                trainer.folder,
                cfg.dump(),
                period=cfg.CHECKPOINT.PERIOD,
                keep=cfg.CHECKPOINT.KEEP,
                improved=lambda: evaluate.improved,
                images=trainer.train_set.fingerprint,
            ),
            LogHook(cls.build_writers(cfg, trainer.folder), period=cfg.LOG.PERIOD_STEPS),
        ]
        if cfg.SOLVER.RESET_STATE:
            hooks.append(ResetStateHook())
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

    def _open_folder(self) -> str | None:
        """Claim the folder; of a run in it nothing changes before it is known that this one continues it.

        Returns:
            The precision that the run in it was made in, which `SOLVER.AMP auto` keeps; None if there is none.
        """
        comm.on_first_rank(self.run.claim)
        fresh = comm.on_first_rank(lambda: not self.run.holds_run())
        setup_logging(self.folder if fresh else None)
        if self.run.holds_checkpoint():  # refused at once, and not when all images have been read
            with self.run.released_on_error():
                newest = checkpoint.last_checkpoint(self.folder)
                content = checkpoint.load_checkpoint(newest)
                refuse_other_config(content["config"], self.cfg.dump(), newest)
            return content.get("amp")
        return None

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue the run of `OUTPUT_DIR`, or begin one with `MODEL.WEIGHTS`, which the model has been given.

        Args:
            resume: continue from the newest checkpoint; where there is none, begin, with a warning. False begins.

        Raises:
            ValueError: the folder holds a run and `resume` is False, or the run was made with another config.
        """
        if resume and comm.on_first_rank(self.run.holds_checkpoint):
            self.resume()
            return
        with self.run.released_on_error():
            if not resume:
                comm.on_first_rank(self.run.refuse_a_run)
        if resume:
            logger.warning("%s holds no checkpoint to resume from; the run starts from the beginning.", self.folder)
        self._accept()

    def resume(self) -> None:
        """Continue from the newest checkpoint of `OUTPUT_DIR`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was made with another config.
        """
        with self.run.released_on_error():
            self.hook(CheckpointHook).resume()
        self._accept()

    def _accept(self) -> None:
        """From here on the folder is this run's."""
        about = "".join(f"{name}: {value}\n" for name, value in environment(self.device).items())
        comm.on_first_rank(lambda: self.run.accept({"config.yaml": self.cfg.dump(), "environment.txt": about}))
        setup_logging(self.folder)
        self._accepted = True

    def train(self) -> None:
        """Run all epochs that are left, and print the scores of the last one.

        Raises:
            ValueError: the folder holds a run that was not resumed.
            RuntimeError: another process uses the folder; see also `Trainer.train`.
        """
        if not self._accepted:
            self.resume_or_load(resume=False)
        comm.on_first_rank(self.run.claim)
        if self.epochs_done >= self.epochs:
            logger.info(
                "The run in %s is finished, all %d epochs are done. To train longer raise SOLVER.EPOCHS.",
                self.folder,
                self.epochs,
            )
        try:
            super().train()
        finally:
            self.run.release()
        log_results(self.results)

    @property
    def results(self) -> dict[str, dict[str, float]]:
        """Numbers of the latest evaluation, by test set."""
        return self.hook(EvaluateHook).results

    @classmethod
    def load_model(cls, cfg: Any) -> MetaArch:
        """The model of `MODEL.WEIGHTS`, or else of the newest checkpoint of `OUTPUT_DIR`, on its device.

        Raises:
            FileNotFoundError: there is neither.
            ValueError: the checkpoint is of another model.
        """
        device = comm.init_from_environment(cfg.MODEL.DEVICE, cfg.DISTRIBUTED.TIMEOUT_MINUTES)
        if cfg.MODEL.WEIGHTS:
            if Path(cfg.MODEL.WEIGHTS).is_file():
                with contextlib.suppress(UserError):  # of another framework
                    warn_of_other_input(cfg, checkpoint.load_checkpoint(cfg.MODEL.WEIGHTS), cfg.MODEL.WEIGHTS)
            return cls.build_model(cfg, num_images=1).to(device)
        file = checkpoint.last_checkpoint(Path(cfg.OUTPUT_DIR))
        content = checkpoint.load_checkpoint(file)
        warn_of_other_input(cfg, content, file)
        model = cls.build_model(cfg, content.get("num_images", 1))
        checkpoint.load_model(model, content, file)
        return model.to(device)

    @classmethod
    def test(cls, cfg: Any, model: MetaArch) -> dict[str, dict[str, float]]:
        """Evaluate a model, which is on its device, on every one of `DATASETS.TESTS`, and print the scores.

        Returns:
            name of the test set → mAP, mINP, rank1, rank5, rank10 in percent.
        """
        once = cfg.clone()
        once.defrost()
        once.TEST.PERIOD = 0
        evaluators = cls.build_evaluators(once, next(model.parameters()).device)
        results = {name: evaluate(model) for name, evaluate in evaluators.items()}
        log_results(results)
        return results


def warn_of_other_input(cfg: Any, content: Mapping[str, Any], file: str | Path) -> None:
    """Say where a config shows a model other images than it was trained with."""
    trained = yaml.safe_load(content["config"])["INPUT"]
    for key in ("SIZE", "MEAN", "STD"):
        if list(cfg.INPUT[key]) != list(trained[key]):
            logger.warning(
                "INPUT.%s is %s, but %s was trained with %s; its scores are those of other images. Set it to %s.",
                key,
                list(cfg.INPUT[key]),
                file,
                list(trained[key]),
                list(trained[key]),
            )


def log_results(results: Mapping[str, Mapping[str, float]]) -> None:
    """A table of scores, one row for each test set."""
    if results and comm.rank() == 0:
        columns = list(next(iter(results.values())))
        rows = [[name, *(numbers[column] for column in columns)] for name, numbers in results.items()]
        logger.info("\n%s", tabulate(rows, ["data set", *columns], floatfmt=".2f"))
