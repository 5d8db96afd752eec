"""Batch norm whose statistics are shared by a set number of images, and batch norm of each domain."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastreid_uns.errors import InvalidValue
from fastreid_uns.modeling.backbones.base import feature_map
from fastreid_uns.utils import comm


class GhostBatchNorm(_BatchNorm):
    """Batch norm that, in training, normalises each `group` consecutive images by their own statistics.

    The running statistics follow the first group only, as `nn.DataParallel` leaves them with one group on each
    device. A group may be a multiple of the local batch: then statistics are shared with the next processes, with
    exact gradients, and the running statistics are those of the first group on every process. In evaluation it is
    plain batch norm. Parameters, buffers and their names are those of the layer that it replaces.

    Args:
        norm: the layer to replace; its parameters and buffers are taken over, not copied.
        group: images that share statistics; 0 = the local batch.
    """

    def __init__(self, norm: _BatchNorm, group: int) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, affine=False, track_running_stats=False)
        self.affine = norm.affine
        self.track_running_stats = norm.track_running_stats
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        for name, child in norm.named_children():  # timm's layers carry their activation
            self.add_module(name, child)
        self.train(norm.training)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,...) → the same shape.

        Raises:
            ValueError: in training, B does not fit the group.
        """
        return self.after(_join(self.pieces(x)) if self.training else super().forward(x))

    def pieces(self, x: Tensor) -> list[Tensor]:
        """Normalised groups, in order; their rows together are those of `x`."""
        batch, group = len(x), self.group or len(x)
        if batch == group:
            return [super().forward(x)]
        if batch % group == 0:
            if torch.compiler.is_compiling():
                return [self._together(x, group)]
            first, *rest = x.split(group)
            return [
                super().forward(first),
                *(F.batch_norm(part, None, None, self.weight, self.bias, True, 0.0, self.eps) for part in rest),
            ]
        ranks = group // batch
        if group % batch == 0 and comm.world() % ranks == 0:
            return [self._shared(x, ranks)]
        raise InvalidValue(
            f"MODEL.GHOST_BATCH is {group} and a norm layer got {batch} images in each of {comm.world()} processes; "
            f"the images must be a multiple of the group, or the group a multiple of the images that divides into the "
            f"processes. Change GHOST_BATCH (0 = whole batch) or DATALOADER.SAMPLER.BATCH_SIZE."
        )

    def after(self, x: Tensor) -> Tensor:
        """What follows the norm inside the same layer: the drop block and activation of timm's layers."""
        for child in self.children():
            x = child(x)
        return x

    def _together(self, x: Tensor, group: int) -> Tensor:
        """All groups in a few operations on one view: a compiler makes two passes of them, whatever their number.

        The bias is spread over the groups first, so that all sums of the backward pass run over the same values.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(0, (-1, group))
        positions = [1, *range(3, wide.dim())]
        var, mean = torch.var_mean(wide, positions, correction=0, keepdim=True)
        self._track(mean[0].flatten(), var[0].flatten(), wide[0].numel() // wide.shape[2])
        scale, shape = (var + self.eps).rsqrt(), (-1, *[1] * (x.dim() - 2))
        if self.weight is not None:
            scale = scale * self.weight.view(shape)
        out = (wide - mean) * scale
        if self.bias is not None:
            out = out + self.bias.view(shape).expand_as(scale)
        return out.flatten(0, 1).to(x.dtype)

    @torch.compiler.disable
    def _shared(self, x: Tensor, ranks: int) -> Tensor:
        output, mean, var = _SharedBatchNorm.apply(x, self.weight, self.bias, self.eps, ranks)
        self._track(mean, var, x.numel() // x.shape[1] * ranks)
        return output

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics towards mean and biased variance (C,) of `count` values for each channel."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        tracked: Tensor = self.num_batches_tracked  # type: ignore[assignment]
        tracked.add_(1)
        momentum: Any = 1.0 / tracked.to(self.running_mean) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var), momentum)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any (B,C,...) will do."""

    def extra_repr(self) -> str:
        """The layer's numbers and its group."""
        return f"{super().extra_repr()}, group={self.group}"


class FrozenBatchNorm(GhostBatchNorm):
    """Batch norm that normalises by its running statistics in training as well and never changes them.

    Weight and bias are trained as before. Parameters, buffers and their names are those of the layer that it replaces.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm, 0)

    def train(self, mode: bool = True) -> FrozenBatchNorm:
        """Evaluation mode for ever; what follows the norm inside the same layer takes the mode."""
        super().train(mode)
        self.training = False
        return self


class _SharedBatchNorm(torch.autograd.Function):
    """Batch norm over the batches of `ranks` neighbouring processes; all processes hold equally many rows.

    Also gives mean and (biased) variance of the first such group. Gradients of weight and bias are local sums, as
    DistributedDataParallel expects them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: int) -> Any:
        """The output, and mean and variance (C,) of the first group."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, _positions(x), correction=0)
        every = _gather(torch.stack([mean, var]))
        start = comm.rank() // ranks * ranks
        mean, var = _combine(every[start : start + ranks])
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.span = slice(start, start + ranks)
        first = _combine(every[:ranks])
        ctx.mark_non_differentiable(*first)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), *first

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
        """Gradients of input, weight and bias; one gather of two numbers for each channel."""
        x, weight, mean, scale = ctx.saved_tensors
        shape = (1, -1, *[1] * (x.dim() - 2))
        unit = (x - mean.view(shape)) * scale.view(shape)
        sums = torch.stack([grad.to(unit).sum(_positions(x)), (grad * unit).sum(_positions(x))])
        every = _gather(sums)[ctx.span]
        count = x.numel() // x.shape[1] * len(every)
        offset, slope = every.sum(0) / count
        if weight is not None:
            scale = scale * weight
        grad_x = (grad - offset.view(shape) - unit * slope.view(shape)) * scale.view(shape)
        grad_bias, grad_weight = (None, None) if weight is None else sums.to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def _positions(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _gather(value: Tensor) -> Tensor:
    """(world, ...) the values of all processes."""
    every = value.new_empty((comm.world(), *value.shape))
    torch.distributed.all_gather(list(every.unbind()), value.contiguous())
    return every


def _combine(parts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of equally large parts from their (R, 2, C) means and variances."""
    mean = parts[:, 0].mean(0)
    return mean, (parts[:, 1] + (parts[:, 0] - mean).square()).mean(0)


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def ghost_batch_norm(model: nn.Module, group: int) -> nn.Module:
    """Let every batch norm of a model share its statistics among `group` images.

    Instance and layer norms stay as they are, also that `requires_grad` of a parameter, and all names in the
    `state_dict`. Optimisers made before keep working.

    Args:
        model: changed in place.
        group: images; 0 = the local batch of each process, which is plain batch norm.

    Returns:
        The model; another module only if the model itself is a batch norm.

    Raises:
        ValueError: negative, or a single image, which has no variance in the neck.
    """
    if group < 0 or group == 1:
        raise InvalidValue(
            f"MODEL.GHOST_BATCH is {group}; 0 (whole batch) and 2 or more images are accepted. Change it."
        )

    def convert(norm: _BatchNorm) -> nn.Module:
        if isinstance(norm, GhostBatchNorm):
            norm.group = group
            return norm
        return GhostBatchNorm(norm, group) if group else norm

    return _replace(model, convert)


def freeze_norm_statistics(model: nn.Module) -> nn.Module:
    """Let every batch norm of a model that has running statistics keep them as they are, see `FrozenBatchNorm`.

    Instance and layer norms have none and stay as they are. Names in the `state_dict` stay as well.

    Args:
        model: changed in place.

    Returns:
        The model; another module only if the model itself is a batch norm.
    """

    def convert(norm: _BatchNorm) -> nn.Module:
        return norm if norm.running_mean is None else FrozenBatchNorm(norm)

    return _replace(model, convert)


@torch.no_grad()
def folded_norms(model: nn.Module, images: Tensor, *, trained: bool = False) -> nn.Module:
    """A copy in evaluation mode, with each batch norm as part of the convolution before it: fewer passes over memory.

    A norm belongs to the convolution that precedes it among the children of a module. Whether the model computes in
    that order as well is seen from what it makes of some images; if not, it is given back as it is.

    Args:
        model: is put into evaluation mode. Unless it is `trained`, its weights must not change as long as the copy is
            used.
        images: (B, C, H, W) in the layout that the model will get.
        trained: the copy has the very weights of the model, and gradients reach them.

    Returns:
        The copy, or the model itself.
    """
    own = itertools.chain(model.parameters(), model.buffers()) if trained else ()
    folded = copy.deepcopy(model, {id(value): value for value in own}).eval()
    for parent in list(folded.modules()):
        for (place, conv), (next_place, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm) and norm.running_mean is not None:
                setattr(parent, place, _NormedConv(conv, norm) if trained else fuse_conv_bn_eval(conv, norm))
                setattr(parent, next_place, nn.Sequential(*norm.children()))
    expected, found = feature_map(model.eval()(images)), feature_map(folded(images))
    return folded if torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())) else model


class _NormedConv(nn.Module):
    """A convolution with the norm after it, whose statistics stay, as one convolution with the weights of both."""

    def __init__(self, conv: nn.Conv2d, norm: _BatchNorm) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, D, h, w); by the convolution's own forward, which may pad in a way of its own."""
        norm, joined = self.norm, copy.copy(self.conv)
        mean: Any = norm.running_mean
        variance: Any = norm.running_var
        scale = (variance + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        bias = (-mean if joined.bias is None else joined.bias - mean) * scale
        bias = bias if norm.bias is None else bias + norm.bias
        joined._parameters = {"weight": joined.weight * scale[:, None, None, None], "bias": bias}
        return joined(x)


class _Rows:
    """Which domain the rows of the present batch belong to.

    Attributes:
        runs: in training, runs of (domain, images); None = all to domain 0.
        evaluated: in evaluation, the domain of all rows.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[int, int]] | None = None
        self.evaluated = 0


class DomainBatchNorm(nn.Module):
    """One batch norm for each domain; for rows of unknown domain, that of the target.

    Made by `domain_batch_norm`; in training `rows_of_domains` says which rows are whose, in evaluation
    `evaluated_domain`.
    """

    def __init__(self, norm: GhostBatchNorm, num_domains: int, rows: _Rows) -> None:
        super().__init__()
        self.domains = nn.ModuleList([norm, *(copy.deepcopy(norm) for _ in range(num_domains - 1))])
        self.rows = rows
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,...) → the same shape."""
        if not self.training:
            return self.domains[self.rows.evaluated](x)
        runs = self.rows.runs
        if runs is None:
            return self.domains[0](x)
        if len(runs) == 1:
            return self.domains[runs[0][0]](x)
        pieces: list[Tensor] = []
        for (domain, _), part in zip(runs, x.split([count for _, count in runs]), strict=True):
            pieces += self.domains[domain].pieces(part)  # type: ignore[operator]
        return self.domains[0].after(_join(pieces))  # type: ignore[operator]


def domain_batch_norm(model: nn.Module, num_domains: int) -> nn.Module:
    """Give every batch norm of a model statistics and parameters of its own for each domain.

    Each copy starts from the given layer and keeps its `requires_grad`, so weights are loaded before this call.
    `ghost_batch_norm` may come before or after; the groups are then counted within each domain.

    Args:
        model: changed in place.
        num_domains: 1 + the labelled source sets; domain 0 is the unlabelled target.

    Returns:
        The model; another module only if the model itself is a batch norm.

    Raises:
        ValueError: fewer than 2 domains, or the model has domain norms already.

    Source: Chang et al. 2019 (Domain-Specific Batch Normalization); differs from SpCL: a frozen bias stays frozen.
    """
    if num_domains < 2:
        raise InvalidValue(
            f"MODEL.DOMAIN_BN: {num_domains} domain; a target and at least one source are needed. Name a set in "
            f"DATASETS.SOURCES or switch DOMAIN_BN off."
        )
    if any(isinstance(module, DomainBatchNorm) for module in model.modules()):
        raise InvalidValue("domain_batch_norm: the model has norm layers for each domain already. Call it once.")
    rows = _Rows()

    def convert(norm: _BatchNorm) -> nn.Module:
        grouped = norm if isinstance(norm, GhostBatchNorm) else GhostBatchNorm(norm, 0)
        return DomainBatchNorm(grouped, num_domains, rows)

    return _replace(model, convert)


@contextlib.contextmanager
def rows_of_domains(model: nn.Module, domains: Tensor | None) -> Iterator[None]:
    """While it lasts, the norm layers of `domain_batch_norm` read which rows of the batch belong to which domain.

    Args:
        model: without such layers nothing happens.
        domains: (B,) 0 = target, 1.. = sources; rows of one domain stand together. On the CPU, since which layers a
            row takes is for the host to decide. None: all are of the target.

    Raises:
        ValueError: the rows of a domain are scattered, or a domain is unknown.
    """
    layer = None
    if domains is not None:
        layer = next((module for module in model.modules() if isinstance(module, DomainBatchNorm)), None)
    if domains is None or layer is None or not model.training:
        yield
        return
    runs = [(domain, len(list(rows))) for domain, rows in itertools.groupby(domains.tolist())]
    found = [domain for domain, _ in runs]
    if len(set(found)) < len(found):
        raise InvalidValue(
            f"domain norm: the rows of a domain are scattered, domains change {len(found) - 1} times in a batch of "
            f"{len(domains)}; those of one domain must stand together. Join the batch with source rows first."
        )
    if not set(found) <= set(range(len(layer.domains))):
        raise InvalidValue(
            f"domain norm: the batch has domains {sorted(found)}, the model knows 0 to {len(layer.domains) - 1}. Build "
            f"it with one domain for each of DATASETS.SOURCES."
        )
    before = layer.rows.runs
    layer.rows.runs = runs
    try:
        yield
    finally:
        layer.rows.runs = before


@contextlib.contextmanager
def evaluated_domain(model: nn.Module, domain: int) -> Iterator[None]:
    """While it lasts, the norm layers of `domain_batch_norm` evaluate all images as those of one domain.

    Args:
        model: in evaluation mode; without such layers nothing happens.
        domain: 0 = target, 1.. = sources.
    """
    rows = {module.rows for module in model.modules() if isinstance(module, DomainBatchNorm)}
    for each in rows:
        each.evaluated = domain
    try:
        yield
    finally:
        for each in rows:
            each.evaluated = 0


@contextlib.contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """While it lasts, training passes use the statistics of their batch but leave the running ones as they are."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    held = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None if norm.num_batches_tracked is None else norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, held, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


def _replace(module: nn.Module, convert: Any) -> nn.Module:
    if isinstance(module, _BatchNorm):
        return convert(module)
    for name, child in module.named_children():
        new = _replace(child, convert)
        if new is not child:
            setattr(module, name, new)
    return module
