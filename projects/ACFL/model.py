"""Contrast with the means of an instance memory, made harder by gradient ascent on features and images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.meta_arch import MetaArch
from fastreid_uns.modeling.norm import frozen_statistics
from fastreid_uns.registry import META_ARCH_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels

from .ascent import FeatureAscent, check_least, check_word, hard_images, own_column
from .losses import (
    DIRECTIONS,
    class_loss,
    cluster_distribution,
    divergence,
    least_similar,
    next_of_cluster,
    similarities,
    squared_distance,
)
from .memory import ReplacedMemory

INSTANCES = ("kl", "distance", "none")
PARTNERS = ("batch", "drawn")
NORMS = ("batch", "running")


@META_ARCH_REGISTRY.register()
class ACFL(MetaArch):
    """Adversarial contrastive feature learning.

    Each query pays for its centroid among hard centroids, and for the distance to a hard image of its cluster. The
    memory must be a `ReplacedMemory`; the model brings its own losses.

    Args:
        hard, sphere, feature_steps, rate_positive, rate_negative: of the hard person features, see `FeatureAscent`.
        instance: loss between a query and its partner: `kl` of their cluster distributions (over easy centroids),
            `distance`, or `none`.
        direction: of `kl`, see `divergence`.
        partner: `batch` takes another image of the cluster from the batch; `drawn` reads the batch as pairs (query,
            partner), which `PartnerSampler` draws.
        image_steps: Z, ascent steps on the image of the partner; 0 = the image as it is.
        image_rate: length of one step, Euclidean, over all normalised pixels of an image.
        image_norm: norm statistics of the ascent and of the hard image: `batch` = those of their batch, `running` = as
            in evaluation, where a transformer drops no blocks. Running statistics never learn from either.
        mining: in place of the features from ascent take, of the memory, the least similar one of the own cluster and
            the most similar one of each other; as partner take the least similar image of the cluster in the batch.

    Raises:
        ValueError: an unknown word, a number out of range, another memory, or losses beside those of the model.

    Source: ACFL (Pattern Recognition, article 109973), algorithm 1 and eq. 5; `mining`: table 4.
    """

    memory: ReplacedMemory

    def __init__(
        self,
        *parts: Any,
        hard: str = "both",
        sphere: str = "none",
        feature_steps: int = 10,
        rate_positive: float = 0.00035,
        rate_negative: float = 0.0028,
        instance: str = "kl",
        direction: str = "forward",
        partner: str = "batch",
        image_steps: int = 3,
        image_rate: float = 1.0,
        image_norm: str = "batch",
        mining: bool = False,
        **keys: Any,
    ) -> None:
        super().__init__(*parts, **keys)
        self.ascent = FeatureAscent(hard, sphere, feature_steps, rate_positive, rate_negative)
        check_word("INSTANCE", instance, INSTANCES)
        check_word("DIRECTION", direction, DIRECTIONS)
        check_word("PARTNER", partner, PARTNERS)
        check_word("IMAGE_NORM", image_norm, NORMS)
        check_least("IMAGE_STEPS", image_steps)
        check_least("IMAGE_RATE", image_rate)
        name = type(self).__name__
        if not isinstance(self.memory, ReplacedMemory):
            raise InvalidValue(
                f"{name}: MODEL.MEMORY is {type(self.memory).__name__}; means of an instance memory are needed. Set "
                f"MODEL.MEMORY.NAME to ReplacedMemory."
            )
        if self.losses.losses:
            raise InvalidValue(
                f"{name}: MODEL.LOSSES names {', '.join(self.losses.losses)}; this model brings its own losses. Drop "
                f"each entry with null, as in `LOSSES: {{contrast: null}}`."
            )
        if mining and partner == "drawn":
            raise InvalidValue(f"{name}: MODEL.MINING takes its partners from the batch. Set MODEL.PARTNER to batch.")
        self.instance, self.direction, self.partner = instance, direction, partner
        self.image_steps, self.image_rate, self.image_norm = image_steps, image_rate, image_norm
        self.mining = mining
        self._pairs_checked = False

    def update_memory(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Take over a new clustering; the memory is filled with the features that were clustered."""
        super().update_memory(pseudo, bank)
        self._pairs_checked = False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`loss_class`, `loss_instance`, `accuracy` among easy centroids, and the share of queries with a partner."""
        queries, drawn = (batch, None) if self.partner == "batch" else self._pairs(batch)
        feats = self.encoder(queries.views[0]).feats
        centroids = self.memory.centroids
        easy = similarities(feats, centroids)
        loss = class_loss(self._hard(feats, centroids, easy, queries.labels), queries.labels, self.memory.temperature)
        accuracy = (easy.detach().argmax(1) == queries.labels).float().mean()
        outputs = {"loss_class": loss.mean(), "accuracy": accuracy}
        if self.instance != "none":
            rows = self._rows_of_partners(feats, queries) if drawn is None else None
            images, index = (drawn or queries).views[0], (drawn or queries).index
            if rows is not None:
                images, index = images[rows], index[rows]
            outputs["partners"] = (index != queries.index).float().mean()
            outputs["loss_instance"] = self._instance_loss(feats, easy, centroids, images, rows).mean()
        outputs |= self.further_losses(queries, feats)
        if self.training:
            self.remember(feats.detach(), queries)
        return outputs

    def further_losses(self, queries: Batch, feats: Tensor) -> dict[str, Tensor]:
        """What a variant adds: further `loss_<name>`.

        Args:
            queries: the queries of the batch.
            feats: (B,D) their features.
        """
        return {}

    def remember(self, feats: Tensor, queries: Batch) -> None:
        """Write the features of the step into the memory; no later read of this step sees them."""
        self.memory.update(feats, self.memory.rows(queries))

    def _rows_of_partners(self, feats: Tensor, queries: Batch) -> Tensor:
        """(B,) where in the batch the partners stand."""
        if self.mining:
            return least_similar(feats, queries.labels, queries.index)
        return next_of_cluster(queries.labels, queries.index)

    def _hard(self, feats: Tensor, centroids: Tensor, easy: Tensor, labels: Tensor) -> Tensor:
        """(B,K) products with hard centroids."""
        hard = self.ascent.hard
        if not self.mining:
            return self.ascent(feats, centroids, easy, labels, self.memory.temperature).products(feats, easy)
        if hard == "none":
            return easy
        hardest = self.memory.hardest(feats, labels)
        own = own_column(labels, easy)
        return hardest if hard == "both" else torch.where(own if hard == "positive" else ~own, hardest, easy)

    def _instance_loss(
        self, feats: Tensor, easy: Tensor, centroids: Tensor, images: Tensor, rows: Tensor | None
    ) -> Tensor:
        """(B,) loss between each query and its partner, whose image is ascended first.

        Args:
            feats: (B,D) of the queries.
            easy: (B,K) their products with the centroids.
            centroids: (K,D).
            images: (B,3,H,W) of the partners.
            rows: (B,) where the partners stand among the queries, None if they do not.
        """

        def between(first: Tensor, first_easy: Tensor, second: Tensor, second_easy: Tensor) -> Tensor:
            if self.instance == "distance":
                return squared_distance(first, second)
            tau = self.memory.temperature
            return divergence(
                cluster_distribution(first_easy, tau), cluster_distribution(second_easy, tau), self.direction
            )

        def against(first: Tensor, first_easy: Tensor, images: Tensor) -> Tensor:
            second = self.encoder(images).feats
            return between(first, first_easy, second, similarities(second, centroids))

        if self.image_steps == 0 and rows is not None:
            return between(feats, easy, feats[rows], easy[rows])
        with self._norm_of_partners():
            with no_parameter_gradients(self.encoder):
                images = hard_images(
                    images,
                    lambda moved: against(feats.detach(), easy.detach(), moved),
                    steps=self.image_steps,
                    rate=self.image_rate,
                    std=self.encoder.std,
                )
            return against(feats, easy, images)

    @contextlib.contextmanager
    def _norm_of_partners(self) -> Iterator[None]:
        """While it lasts, the encoder normalises as `image_norm` says and its running statistics stay."""
        if self.image_norm == "batch":
            with frozen_statistics(self.encoder):
                yield
            return
        training = self.encoder.training
        self.encoder.eval()
        try:
            yield
        finally:
            self.encoder.train(training)

    def _pairs(self, batch: Batch) -> tuple[Batch, Batch]:
        """The queries and the partners of a batch of pairs."""
        first, second = batch.rows(slice(0, None, 2)), batch.rows(slice(1, None, 2))
        if not self._pairs_checked:
            if len(batch.index) % 2 or not torch.equal(first.labels, second.labels):
                raise InvalidValue(
                    f"{type(self).__name__}: MODEL.PARTNER is drawn but the rows of the batch are no pairs of one "
                    f"cluster. Set DATALOADER.SAMPLER.NAME to PartnerSampler, or MODEL.PARTNER to batch."
                )
            self._pairs_checked = True
        return first, second


@contextlib.contextmanager
def no_parameter_gradients(module: nn.Module) -> Iterator[None]:
    """While it lasts, no parameter asks for a gradient: passes keep, and compute, only what inputs need."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
