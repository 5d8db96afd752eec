"""A data set and its protocol → the numbers of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastreid_uns.data.datasets.own_matches import tell_own_matches
from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.errors import InvalidValue
from fastreid_uns.evaluation.extract import extract_features, share
from fastreid_uns.evaluation.rerank import camera_rerank_blocks, rerank_blocks
from fastreid_uns.evaluation.retrieval import QueryScores, Ranker, block_rows, distance_blocks
from fastreid_uns.modeling.norm import evaluated_domain
from fastreid_uns.structures import ReIDData
from fastreid_uns.utils.comm import all_gather, on_first_rank


class Evaluator:
    """Extracts query and gallery, ranks the gallery for each query, and scores the ranking.

    Several processes share extraction and ranking block by block; each gets the numbers that one process would give.
    A warning is logged where queries are in the gallery themselves and count as matches.

    Args:
        data: query, gallery and protocol.
        images: the query images, then the gallery images.
        rerank: score a second ranking as well, as `mAP_rerank`, `rank1_rerank`, ...: `jaccard`, by k-reciprocal
            neighbours; `camera_jaccard`, by those of the own camera and of others apart; `none`.
        batch_size: images in one forward pass.
        amp: bfloat16 or float16 extracts under autocast, None in full precision.
        domain: whose norm layers are used if the model has some for each domain, 0 = the unlabelled target.

    Raises:
        ValueError: no query has a match; most queries are gallery images as well; images and records disagree; see
            also `Ranker`.
    """

    def __init__(
        self,
        data: ReIDData,
        images: ImageSet,
        *,
        rerank: str = "none",
        batch_size: int = 256,
        amp: torch.dtype | None = None,
        domain: int = 0,
    ) -> None:
        if len(images) != len(data.query) + len(data.gallery):
            raise InvalidValue(
                f"evaluation: {len(images)} images for {len(data.query)} queries and {len(data.gallery)} gallery "
                f"images. Make the image set of [*data.query, *data.gallery]."
            )
        self.ranker = Ranker.of(data)
        on_first_rank(lambda: tell_own_matches(data))
        self.images = images
        self.rerank = rerank
        self.cameras = torch.tensor([record.camera for record in [*data.query, *data.gallery]])
        self.batch_size = batch_size
        self.amp = amp
        self.domain = domain

    def __call__(self, model: Any) -> dict[str, float]:
        """mAP, mINP, rank1, rank5 and rank10 in percent, and `queries`, those that have a match.

        Args:
            model: a module with `extract(images) -> {"feats": (B,D)}`; its training mode is restored.
        """
        with evaluated_domain(model, self.domain):
            outputs = extract_features(model, self.images, batch_size=self.batch_size, amp=self.amp, what="evaluate")
        query, gallery = outputs["feats"].split([self.ranker.query_size, self.ranker.gallery_size])
        metrics = self.score(query, gallery).summary()
        if self.rerank != "none":
            aware = self.rerank == "camera_jaccard"
            blocks = camera_rerank_blocks(query, gallery, self.cameras) if aware else rerank_blocks(query, gallery)
            again = self.ranker.score(blocks).summary()
            del again["queries"]
            metrics.update({f"{name}_rerank": value for name, value in again.items()})
        return metrics

    def score(self, query: Tensor, gallery: Tensor) -> QueryScores:
        """Scores of each query, the same on every rank.

        Args:
            query, gallery: (Q,D) and (G,D) float32, unit length, on one device.
        """
        rows = block_rows(len(gallery))
        starts = share(list(range(0, len(query), rows)))
        first, end = (starts[0], starts[-1] + rows) if starts else (0, 0)
        mine = self.ranker.score(distance_blocks(query[first:end], gallery), first)
        # the gathering is done where the process group works: NCCL takes no tensor of the CPU
        return QueryScores(*(all_gather(values.to(query.device)).cpu() for values in mine))
