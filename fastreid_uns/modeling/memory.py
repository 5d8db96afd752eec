"""Memories: feature rows beside the network that are contrasted with, and moved, in each step.

A memory replaces its buffer and never changes it in place, so logits of the step keep the rows that they were computed
with. All ranks gather the same updates in the same order and hold equal rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.losses import at_least_float32
from fastreid_uns.registry import MEMORY_REGISTRY
from fastreid_uns.structures import Batch, FeatureBank, PseudoLabels
from fastreid_uns.utils import comm


class Memory(nn.Module):
    """Rows of unit features; labelled source classes come before everything else.

    Args:
        dim: D, length of a row.
        momentum: weight of the old row in an update, in [0, 1].
        temperature: divides the similarities, > 0.

    Raises:
        ValueError: momentum or temperature out of range.
    """

    features: Tensor
    moves = True  # whether training moves the rows; else a clustering alone does
    _kept: list[tuple[Tensor, Tensor, int | None]] | None = None  # images of the parts of a batch, see `moved_once`

    def __init__(self, dim: int, *, momentum: float = 0.1, temperature: float = 0.05) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise InvalidValue(f"MODEL.MEMORY.MOMENTUM is {momentum}; a share in [0, 1] is accepted.")
        if temperature <= 0:
            raise InvalidValue(f"MODEL.MEMORY.TEMPERATURE is {temperature}; a number above 0 is accepted.")
        self.momentum = momentum
        self.temperature = temperature
        self.register_buffer("features", torch.zeros(0, dim))

    def reset(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Make the rows anew after a clustering."""
        raise NotImplementedError

    def rows(self, batch: Batch) -> Tensor:
        """(B,) the row to which each image of the batch belongs."""
        raise NotImplementedError

    def forward(self, feats: Tensor, labels: Tensor, most: int | None = None) -> Tensor:
        """Similarity to every row, divided by the temperature; in training rows that move are updated afterwards.

        Args:
            feats: (B, D) unit length.
            labels: (B,) row of each image.
            most: no row has more images than this in the batch of all processes, see `Batch.most`; None = not known,
                which gives the same rows in more operations.

        Returns:
            (B, rows) float32, with gradient to `feats` only.
        """
        with torch.autocast(feats.device.type, enabled=False):
            inputs = at_least_float32(feats)
            logits = inputs @ self.features.to(inputs.dtype).T / self.temperature
        if self.training and self.moves:
            self.update(feats.detach(), labels, most)
        return logits

    @torch.no_grad()
    def update(self, feats: Tensor, labels: Tensor, most: int | None = None) -> None:
        """Gather the images of all ranks, equally many each, and replace `features` by the moved rows.

        Within `moved_once` this happens at its end.
        """
        if self._kept is not None:
            self._kept.append((feats, labels, most))
            return
        with torch.autocast(feats.device.type, enabled=False):
            feats = comm.all_gather(feats.to(self.features.dtype), equal=True)
            self.features = self._moved(feats, comm.all_gather(labels, equal=True), most)

    def _moved(self, feats: Tensor, labels: Tensor, most: int | None) -> Tensor:
        return move_in_order(self.features, feats, labels, self.momentum, most)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        take_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


@contextlib.contextmanager
def moved_once(model: nn.Module) -> Iterator[None]:
    """While it lasts, the memories of a model keep their rows; at its end each moves once, by all images in order.

    So a batch that goes through the model in parts sees and leaves the rows that the whole batch would.
    """
    memories = [module for module in model.modules() if isinstance(module, Memory)]
    for memory in memories:
        memory._kept = []
    try:
        yield
    except BaseException:
        for memory in memories:
            memory._kept = None
        raise
    for memory in memories:
        kept, memory._kept = memory._kept, None
        if kept:
            feats, labels, most = zip(*kept, strict=True)
            memory.update(torch.cat(feats), torch.cat(labels), most[0])


@MEMORY_REGISTRY.register()
class ClusterMemory(Memory):
    """One row for each source class and each cluster, its centroid; made anew at each clustering.

    Args:
        hard: move a row once, towards the image of its cluster that is least similar to it, instead of towards each
            image in turn.

    Source: Dai et al. 2022 (Cluster Contrast), eq. 5 (plain) and the hard variant of its first version.

    Example:
        >>> feats = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> pseudo = PseudoLabels(labels=torch.tensor([0, 0, 1]), centroids=torch.eye(2))
        >>> memory = ClusterMemory(2, momentum=0.5, temperature=0.5)
        >>> memory.reset(pseudo, FeatureBank(feats, cameras=torch.tensor([0, 1, 0])))
        >>> memory(torch.tensor([[0.6, 0.8]]), torch.tensor([0]))  # cosine to each centroid, divided by 0.5
        tensor([[1.2000, 1.6000]])
        >>> memory.features[0]  # has moved to the direction of 0.5 (1, 0) + 0.5 (0.6, 0.8)
        tensor([0.8944, 0.4472])
    """

    def __init__(self, dim: int, *, momentum: float = 0.1, temperature: float = 0.05, hard: bool = False) -> None:
        super().__init__(dim, momentum=momentum, temperature=temperature)
        self.hard = hard

    def reset(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Rows = centroids of the source classes, then of the clusters."""
        self.features = torch.cat([*source_rows(bank), pseudo.centroids.float()]).to(self.features.device)

    def rows(self, batch: Batch) -> Tensor:
        """(B,) the label of each image."""
        return batch.labels

    def _moved(self, feats: Tensor, labels: Tensor, most: int | None) -> Tensor:
        if not self.hard:
            return super()._moved(feats, labels, most)
        similarity = (feats * self.features[labels]).sum(1)
        hardest = similarity.argsort(stable=True)
        order, rows, first = _by_row(labels[hardest])
        moved = _towards(self.features[rows], feats[hardest[order]][first], self.momentum)
        return self.features.index_copy(0, rows, moved)  # images of one row write the same


@MEMORY_REGISTRY.register()
class InstanceMemory(Memory):
    """One row for each source class and each training image.

    `reset` sets the image rows to the bank's features. A method that clusters its memory gives those very rows as the
    bank, and so keeps them; source rows change only when the bank holds fresh source features.

    Example:
        >>> pseudo = PseudoLabels(labels=torch.tensor([0, 0]), centroids=torch.tensor([[0.6, 0.8]]))
        >>> memory = InstanceMemory(2, momentum=0.5, temperature=0.5)
        >>> memory.reset(pseudo, FeatureBank(torch.eye(2), cameras=torch.tensor([0, 1])))
        >>> memory(torch.tensor([[0.6, 0.8]]), torch.tensor([1]))  # cosine to each image, divided by 0.5
        tensor([[1.2000, 1.6000]])
        >>> memory.features  # row 1 has moved to the direction of 0.5 (0, 1) + 0.5 (0.6, 0.8)
        tensor([[1.0000, 0.0000],
                [0.3162, 0.9487]])
    """

    num_source: Tensor

    def __init__(self, dim: int, *, momentum: float = 0.2, temperature: float = 0.05) -> None:
        super().__init__(dim, momentum=momentum, temperature=temperature)
        self.register_buffer("num_source", torch.zeros((), dtype=torch.int64))

    def reset(self, pseudo: PseudoLabels, bank: FeatureBank) -> None:
        """Rows = source centroids (kept if the bank brings none), then the image features of the bank."""
        source = source_rows(bank) or [self.features[: int(self.num_source)]]
        self.features = torch.cat([part.to(self.features.device) for part in (*source, bank.feats.float())])
        self.num_source = torch.tensor(len(source[0]), device=self.features.device)

    def rows(self, batch: Batch) -> Tensor:
        """(B,) the class of a source image; the row of its own for an unlabelled one."""
        source = batch.domains.to(batch.index.device, non_blocking=True) > 0
        return torch.where(source, batch.labels, batch.index + self.num_source)


def take_shapes(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Give the buffers of a module the shapes that they have in a checkpoint: clusterings differ in their rows."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        saved = state_dict.get(prefix + name)
        if saved is not None and saved.shape != buffer.shape:
            setattr(module, name, buffer.new_zeros(saved.shape))


def source_rows(bank: FeatureBank) -> list[Tensor]:
    """The unit-length class means (C,D) of the labelled source images, or nothing, as a list to concatenate."""
    if bank.source_feats is None or bank.source_labels is None:
        return []
    labels = bank.source_labels.to(bank.source_feats.device)
    total = bank.source_feats.new_zeros(int(labels.max()) + 1, bank.source_feats.shape[1])
    return [F.normalize(total.index_add_(0, labels, bank.source_feats))]


def move_in_order(features: Tensor, feats: Tensor, labels: Tensor, momentum: float, most: int | None = None) -> Tensor:
    """Rows after `row = unit(momentum * row + (1 - momentum) * image)` for each image in batch order.

    Images of one row act one after the other, those of different rows at once: turn t moves the rows that have more
    than t images, of which there are at most B / (t + 1). All sizes follow from B and `most`, so the host never waits
    for the device; equal to the loop over images bit for bit.

    Args:
        features: (rows, D).
        feats: (B, D) unit length.
        labels: (B,) row of each image.
        most: no row has more images than this, which sets the number of turns; None = not known, B turns.

    Returns:
        (rows, D), a new tensor.
    """
    batch = len(labels)
    order, labels, first = _by_row(labels)
    feats = feats[order]
    place = torch.arange(batch, device=labels.device)
    images = torch.where(first == place, torch.searchsorted(labels, labels, right=True) - place, 0)
    if most is not None:
        torch._assert_async((images <= most).all(), f"memory: a batch holds more than {most} images of one row.")
    starts = images.argsort(descending=True, stable=True)  # the first images of the rows, those of most images first
    images = images[starts, None]
    moved = features[labels[starts]]
    for turn in range(min(batch, most or batch)):
        count = batch // (turn + 1)
        step = _towards(moved[:count], feats[(starts[:count] + turn).clamp_max(batch - 1)], momentum)
        moved[:count] = torch.where(images[:count] > turn, step, moved[:count])
    return features.index_copy(0, labels, moved[starts.argsort()[first]])


def _by_row(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) each: a stable order of the images by row, their rows in it, and for each the place of its row's first."""
    order = labels.argsort(stable=True)
    labels = labels[order]
    return order, labels, torch.searchsorted(labels, labels)


def _towards(rows: Tensor, feats: Tensor, momentum: float) -> Tensor:
    return F.normalize(momentum * rows + (1.0 - momentum) * feats)
