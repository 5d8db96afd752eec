"""Before each epoch: features of all training images, and from them the labels of the epoch."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

import torch

from fastreid_uns.data.loader import TrainLoader
from fastreid_uns.errors import InvalidState
from fastreid_uns.evaluation.clusters import cluster_quality
from fastreid_uns.evaluation.extract import extract_features
from fastreid_uns.hook import HookBase
from fastreid_uns.pseudo_labels.base import PseudoLabelGenerator, centroids
from fastreid_uns.structures import FeatureBank, NoClusters, PseudoLabels
from fastreid_uns.utils import comm, sharing

logger = logging.getLogger(__name__)


class ReclusterHook(HookBase):
    """Before each epoch: extract → pseudo labels → train set → memory → plan of the batches.

    Args:
        generator: makes the labels; on rank 0 only, unless it is `shared`.
        loader: its train set gets the labels; it plans the batches.
        batch_size: images in one forward pass of the extraction.
        measure: compare the clusters with the true identities, as far as they are known; for the log only.
    """

    order = 10

    def __init__(
        self, generator: PseudoLabelGenerator, loader: TrainLoader, *, batch_size: int = 256, measure: bool = False
    ) -> None:
        self.generator = generator
        self.loader = loader
        self.train_set = loader.train_set
        self.batch_size = batch_size
        self.measure = measure

    @property
    def pseudo(self) -> PseudoLabels | None:
        """The latest clustering."""
        return self.train_set.pseudo

    def before_epoch(self) -> None:
        """Cluster, and hand the labels on."""
        trainer = self.trainer
        with trainer.timed("extract"):
            bank = self._bank()
        pseudo = self._cluster(bank)
        self.train_set.pseudo = pseudo
        trainer.model.update_memory(pseudo.to(trainer.device), bank)
        self.loader.plan(trainer.epoch)
        self._report(pseudo)

    def _report(self, pseudo: PseudoLabels) -> None:
        sizes = pseudo.sizes
        self.trainer.metrics.update(
            clusters=pseudo.num_clusters,
            outliers=int((pseudo.labels < 0).sum()),
            largest_cluster=int(sizes.max()),
            median_cluster=int(sizes.median()),
        )
        if self.measure:
            records = self.train_set.records[: self.train_set.num_images]
            identities = torch.tensor([record.identity for record in records])
            if bool((identities >= 0).any()):
                self.trainer.metrics.update(cluster_quality(pseudo.labels, identities))
        if pseudo.num_clusters == 1:
            logger.warning(
                "PSEUDO_LABELS: all %d clustered images are in one cluster, there is nothing to tell apart; lower EPS.",
                int(sizes.sum()),
            )

    def _bank(self) -> FeatureBank:
        model, table, count = self.trainer.model, self.train_set, self.train_set.num_images
        cameras = table.cameras[:count]
        rows = model.memory_bank()
        if rows is not None:
            return FeatureBank(rows, cameras)
        outputs = extract_features(
            model, table.images, device=self.trainer.device, batch_size=self.batch_size, amp=self.trainer.amp
        )
        feats = outputs.pop("feats")
        bank = FeatureBank(feats[:count], cameras, {name: value[:count] for name, value in outputs.items()})
        if table.source_classes is not None:
            bank.source_feats, bank.source_labels = feats[count:], table.source_classes
        return bank

    def _cluster(self, bank: FeatureBank) -> PseudoLabels:
        """The labels of rank 0 on every rank; an error of rank 0 as well, lest the others wait for ever."""
        result: PseudoLabels | Exception | None = None
        shared = self.generator.shared and comm.world() > 1 and sharing.equal_on_all(bank.feats)
        if shared or comm.rank() == 0:
            try:
                with sharing.by_all_ranks() if shared else nullcontext():
                    result = self._generate(bank).to("cpu")
            except (ValueError, RuntimeError, ImportError, OSError, MemoryError) as error:
                if comm.world() == 1:
                    raise
                result = error
        result, seconds = comm.broadcast_object((result, self.generator.seconds))
        if not isinstance(result, PseudoLabels):
            raise InvalidState(f"pseudo labels failed on rank 0: {result}") from result
        for stage, spent in seconds.items():
            self.trainer.metrics[f"seconds_{stage}"] = spent
        return result

    def _generate(self, bank: FeatureBank) -> PseudoLabels:
        try:
            return self.generator(bank, self.trainer.epoch)
        except NoClusters as error:
            if self.pseudo is None:
                raise
            logger.warning("%s The labels of the epoch before are kept for this one.", error)
            labels = self.pseudo.labels
            kept = centroids(bank.feats, labels.to(bank.feats.device))
            return PseudoLabels(labels, kept.cpu(), self.pseudo.extras)

    def state_dict(self) -> dict[str, Any]:
        """State of the generator, and the labels of the last epoch."""
        state: dict[str, Any] = {"generator": self.generator.state_dict()}
        if self.pseudo is not None:
            state |= {"labels": self.pseudo.labels, "centroids": self.pseudo.centroids, "extras": self.pseudo.extras}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both."""
        self.generator.load_state_dict(state["generator"])
        if "labels" in state:
            self.train_set.pseudo = PseudoLabels(state["labels"], state["centroids"], state["extras"])
