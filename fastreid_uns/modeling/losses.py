"""Losses as plain modules: the parameter names of `forward` say which tensors a loss wants."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.errors import InvalidValue, UnknownName
from fastreid_uns.registry import LOSS_REGISTRY
from fastreid_uns.structures import Moment
from fastreid_uns.utils.comm import all_gather, all_gather_with_gradient


def at_least_float32(value: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


@LOSS_REGISTRY.register()
class CrossEntropyLoss(nn.Module):
    """Mean cross entropy of `logits` against `labels`.

    Args:
        smoothing: share of the target that is spread evenly over all classes, in [0, 1).
    """

    def __init__(self, *, smoothing: float = 0.0) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise InvalidValue(f"CrossEntropyLoss: SMOOTHING is {smoothing}; a share in [0, 1) is accepted.")
        self.smoothing = smoothing

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Scalar; logits (B,K), labels (B,) in 0..K-1."""
        return F.cross_entropy(at_least_float32(logits), labels, label_smoothing=self.smoothing)


@LOSS_REGISTRY.register()
class SoftCrossEntropyLoss(nn.Module):
    """Mean cross entropy of `logits` against the softmax of `teacher_logits`, which get no gradient."""

    def forward(self, logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """Scalar; both (B,K)."""
        return F.cross_entropy(at_least_float32(logits), at_least_float32(teacher_logits.detach()).softmax(1))


def instance_contrast(first: Tensor, second: Tensor, same: Tensor, temperature: float) -> Tensor:
    """Cross entropy of finding the other view of each image among those of all images of the batch, both ways.

    Args:
        first, second: (B,D) two views of each image, unit length.
        same: (B,) images with the same number are sought together; they share the target evenly.
        temperature: similarities are divided by it.

    Returns:
        Scalar, the mean over images and ways.
    """
    logits = at_least_float32(first) @ at_least_float32(second).T / temperature
    target = (same[:, None] == same).to(logits.dtype)
    target = target / target.sum(1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@LOSS_REGISTRY.register()
class InstanceContrastLoss(nn.Module):
    """Each image against the others of the batch of its process: no cluster is needed, every image is a class.

    Args:
        temperature: similarities are divided by it.

    Source: Chen et al. 2020 (SimCLR), between the views of the model and of its momentum encoder.
    """

    def __init__(self, *, temperature: float = 0.2) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, feats: Tensor, teacher_feats: Tensor, index: Tensor) -> Tensor:
        """Scalar; feats and teacher_feats (B,D), index (B,) of the image."""
        return instance_contrast(feats, teacher_feats, index, self.temperature)


@LOSS_REGISTRY.register()
class SoftTripletLoss(nn.Module):
    """Soft-margin triplet loss on the hardest positive and negative in the batch of all processes.

    An image without a positive or a negative in the batch contributes nothing.

    Source: Hermans et al. 2017, soft-margin batch hard, on Euclidean distances.
    """

    def forward(self, feats: Tensor, labels: Tensor) -> Tensor:
        """Scalar; feats (B,D), labels (B,)."""
        feats = all_gather_with_gradient(at_least_float32(feats))
        labels = all_gather(labels, equal=True)
        norm = feats.pow(2).sum(1)
        with torch.autocast(feats.device.type, enabled=False):  # the difference of large numbers is small
            distance = (norm[:, None] + norm[None] - 2.0 * feats @ feats.T).clamp_min(1e-12).sqrt()
        same = labels[:, None] == labels[None]
        self_pair = torch.eye(len(feats), dtype=torch.bool, device=feats.device)
        positive = same & ~self_pair
        hardest_positive = distance.masked_fill(~positive, -torch.inf).amax(1)
        hardest_negative = distance.masked_fill(same, torch.inf).amin(1)
        usable = positive.any(1) & (~same).any(1)
        gap = torch.where(usable, hardest_positive - hardest_negative, distance.new_zeros(()))
        return (F.softplus(gap) * usable).sum() / usable.sum().clamp_min(1)


class LossSet(nn.Module):
    """The weighted losses of a config, fed by name.

    Args:
        losses: name in the log → (module, weight).
        start_epochs: name → first epoch in which the loss counts, from 0; before, it is neither computed nor logged.

    Attributes:
        moment: where in the run this is; a loss may ask for its `epoch` and its `progress`, plain numbers.

    Raises:
        ValueError: an epoch below 0.

    Example:
        >>> losses = LossSet({"contrast": (CrossEntropyLoss(), 2.0)})
        >>> losses({"logits": torch.zeros(1, 2), "labels": torch.tensor([0])})  # 2 log 2
        {'loss_contrast': tensor(1.3863)}
    """

    def __init__(
        self, losses: Mapping[str, tuple[nn.Module, float]], start_epochs: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        self.moment = Moment()
        self.start_epochs = dict(start_epochs or {})
        for name, epoch in self.start_epochs.items():
            if epoch < 0:
                raise InvalidValue(
                    f"MODEL.LOSSES.{name}.START_EPOCH is {epoch}; 0 (from the start) or more is accepted. Change it."
                )
        self.losses = nn.ModuleDict({name: loss for name, (loss, _) in losses.items()})
        self.weights = {name: weight for name, (_, weight) in losses.items()}
        self.input_names = {
            name: list(inspect.signature(loss.forward).parameters) for name, (loss, _) in losses.items()
        }

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`loss_<name>` → weighted scalar.

        Args:
            inputs: every tensor that the model has at hand, by name.

        Raises:
            KeyError: a loss asks for a tensor that the model does not have; the message lists those that it has.
        """
        outputs = {}
        held: dict[str, Any] = {"epoch": self.moment.epoch, "progress": self.moment.progress, **inputs}
        for name, loss in self.losses.items():
            missing = [key for key in self.input_names[name] if key not in held]
            if missing:
                raise UnknownName(
                    f"MODEL.LOSSES.{name}: {type(loss).__name__} asks for {', '.join(missing)}; this model has "
                    f"{', '.join(held)}. Use another loss, or a MODEL.NAME that has it."
                )
            if self.moment.epoch >= self.start_epochs.get(name, 0):
                outputs[f"loss_{name}"] = self.weights[name] * loss(*(held[key] for key in self.input_names[name]))
        return outputs


def similarity(feats: Tensor, keys: Tensor) -> Tensor:
    """(B,K) inner products, at least in float32; feats (B,D), keys (K,D)."""
    return at_least_float32(feats) @ at_least_float32(keys).T


def all_keys(teacher_feats: Tensor) -> Tensor:
    """(K,D) momentum features of the batches of all processes, in order of rank, without gradient."""
    return all_gather(teacher_feats.detach(), equal=True)
