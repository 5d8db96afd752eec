"""The hybrid memory: source class centroids, and the feature of each unlabelled image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.memory import InstanceMemory
from fastreid_uns.registry import MEMORY_REGISTRY
from fastreid_uns.structures import FeatureBank, PseudoLabels


@MEMORY_REGISTRY.register()
class HybridMemory(InstanceMemory):
    """Rows of source classes and images, and the label that each row has in this round.

    A call gives the similarity to each row; `label_logits` makes it that to each label: a cluster is compared with the
    plain mean of its rows, which is not brought to unit length, a source class and a single image with their row.
    Rows are never made anew: clustering finds new labels for the rows that there are.

    Args:
        momentum: weight of the old row in an update, in [0, 1].
        temperature: divides the similarities, > 0.
        source_mean: move the row of a source class once, towards the mean of its images in the batch, as the paper
            writes it, instead of towards each image in turn, as the published code does.
        target_first: let the gradient of source images see the rows that the unlabelled images of the same batch have
            moved already, as the published code does by the order of its backward pass; the loss does not change.
            Needs the whole batch at once, so `SOLVER.ACCUMULATE` 1.

    Raises:
        ValueError: a parameter out of range; in `forward`, `target_first` and a batch in parts.

    Source: Ge et al. 2020 (SpCL), hybrid memory and its momentum updates.
    """

    row_labels: Tensor
    label_sizes: Tensor

    def __init__(
        self,
        dim: int,
        *,
        momentum: float = 0.2,
        temperature: float = 0.05,
        source_mean: bool = False,
        target_first: bool = False,
    ) -> None:
        super().__init__(dim, momentum=momentum, temperature=temperature)
        self.source_mean = source_mean
        self.target_first = target_first
        # made anew at each clustering, with which also a resumed run begins
        self._sources = 0
        self.register_buffer("row_labels", torch.zeros(0, dtype=torch.int64), persistent=False)
        self.register_buffer("label_sizes", torch.zeros(0), persistent=False)

    def reset(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Take over the labels of a clustering; image rows are those of the bank, see `InstanceMemory.reset`.

        Rows of images without label (-1) keep their features and are contrasted with nothing.
        """
        super().reset(pseudo, bank)
        self._sources = int(self.num_source)
        labels = pseudo.labels.to(self.features.device)
        # images without label count for one that `label_logits` leaves out
        labels = torch.where(labels < 0, pseudo.num_clusters, labels) + self._sources
        self.row_labels = torch.cat([torch.arange(self._sources, device=labels.device), labels])
        self.label_sizes = self.row_labels.bincount(minlength=self._sources + pseudo.num_clusters + 1).float()

    @property
    def instances(self) -> Tensor | None:
        """(N, D) rows of the unlabelled images, None before the first clustering."""
        return self.features[int(self.num_source) :] if len(self.features) else None

    def forward(self, feats: Tensor, labels: Tensor, most: int | None = None) -> Tensor:
        """(B, rows) similarity to every row, see `Memory.forward`; `labels` (B,) are rows."""
        before = self.features
        logits = super().forward(feats, labels, most)
        if not (self.training and self.target_first):
            return logits
        if self._kept is not None:
            raise InvalidValue(
                "MODEL.MEMORY.TARGET_FIRST is true and SOLVER.ACCUMULATE above 1; the rows that the whole batch moves "
                "are needed for its gradient. Set ACCUMULATE to 1, or TARGET_FIRST to false."
            )
        moved = torch.cat([before[: self._sources], self.features[self._sources :]])
        with torch.autocast(feats.device.type, enabled=False):
            after = feats.float() @ moved.T / self.temperature
        # value of the old rows, gradient of the moved ones
        return torch.where((labels < self._sources)[:, None], logits.detach() + after - after.detach(), logits)

    def label_logits(self, logits: Tensor) -> Tensor:
        """Mean of the similarities over the rows of each label.

        Args:
            logits: (B, rows) of `forward`.

        Returns:
            (B, K) for the C source classes, then the clusters of this round; equal from run to run on the CPU, CUDA
            adds up in any order unless `torch.use_deterministic_algorithms` is on.
        """
        total = logits.new_zeros(len(logits), len(self.label_sizes)).index_add(1, self.row_labels, logits)
        return (total / self.label_sizes.clamp_min(1))[:, :-1]

    def _moved(self, feats: Tensor, labels: Tensor, most: int | None) -> Tensor:
        features = super()._moved(feats, labels, most)
        if not self.source_mean:
            return features
        old = self.features[: self._sources]
        place = labels.clamp_max(self._sources)  # unlabelled images gather behind the source classes
        total = old.new_zeros(self._sources + 1, old.shape[1]).index_add_(0, place, feats)[:-1]
        ones = old.new_ones(len(place), 1)
        count = old.new_zeros(self._sources + 1, 1).index_add_(0, place, ones)[:-1]
        mean = F.normalize(self.momentum * old + (1.0 - self.momentum) * total / count.clamp_min(1))
        return torch.cat([torch.where(count > 0, mean, old), features[self._sources :]])
