"""Whether training starts from the features that the pseudo labels were made of."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F

from fastreid_uns.data.loader import TrainLoader
from fastreid_uns.hook import HookBase
from fastreid_uns.modeling.norm import frozen_statistics
from fastreid_uns.utils import comm

LOW = 0.5  # mean cosine below which the labels belong to other features than those that are trained
logger = logging.getLogger(__name__)


class AgreementHook(HookBase):
    """Before the first epoch: mean cosine of the features that cluster and those of a step, as `feature_agreement`.

    Both are of the same images, without augmentation. Labels come from running norm statistics (of the momentum
    encoder where there is one), a training step uses those of its batch; where the two disagree, the labels are not
    about the features that are trained. Norm statistics and random numbers are left as they are.

    Args:
        loader: of the training images.
        parts: into which a batch is cut, as `SOLVER.ACCUMULATE` says.
        pretrained: whether the run starts from weights worth keeping; a low agreement at the start is then a warning.
    """

    order = 15

    def __init__(self, loader: TrainLoader, *, parts: int, pretrained: bool) -> None:
        count, batch = loader.train_set.num_images, loader.sampler.batch_size // comm.world() // parts
        self.images = loader.images
        self.rows = [i * count // batch for i in range(batch)]  # spread over the unlabelled images
        self.pretrained = pretrained

    def before_epoch(self) -> None:
        """Compare before the first epoch, and log."""
        if self.trainer.epoch:
            return
        agreement = self.trainer.metrics["feature_agreement"] = self._agreement()
        if not self.pretrained or agreement >= LOW:
            return
        logger.warning(
            "The features of a training step agree with those that were clustered only to %.2f (mean cosine), so "
            "training starts far from MODEL.WEIGHTS. If it should keep what they know, set MODEL.FREEZE_NORM to true "
            "and MODEL.HEAD.NECK to none.",
            agreement,
        )

    @torch.no_grad()
    def _agreement(self) -> float:
        trainer, model = self.trainer, self.trainer.model
        training = model.training
        pixels = next(self.images.stream([self.rows], trainer.device))
        devices = [trainer.device] if trainer.device.type == "cuda" else []
        with (
            torch.autocast(trainer.device.type, dtype=trainer.amp, enabled=trainer.amp is not None),
            torch.random.fork_rng(devices),
            torch.compiler.set_stance("force_eager"),  # a graph for one batch is not worth its compilation
            frozen_statistics(model),
        ):
            clustered = model.eval().deploy(pixels).feats
            trained = model.train().encoder(pixels).feats
        model.train(training)
        return float(F.cosine_similarity(clustered.float(), trained.float()).mean())
