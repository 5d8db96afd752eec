"""Parameter groups, optimiser, schedule and precision."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fastreid_uns.engine.cpu_precision import faster_precision
from fastreid_uns.errors import InvalidValue, UnknownName
from fastreid_uns.registry import did_you_mean
from fastreid_uns.utils import comm

SCHEDULES = ("step", "milestones", "cosine", "constant")
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "none": None}


def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that `SOLVER` names, over all parameters that need a gradient.

    Norm weights and biases (parameters with at most one dimension) decay by `WEIGHT_DECAY_NORM`.

    Raises:
        KeyError: neither torch.optim nor timm knows the name.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": cfg.SOLVER.WEIGHT_DECAY},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": cfg.SOLVER.WEIGHT_DECAY_NORM},
    ]
    kind = _optimizer_class(cfg.SOLVER.OPTIMIZER)
    options = {"lr": cfg.SOLVER.BASE_LR, **cfg.SOLVER.OPTIMIZER_ARGS}
    accepted = inspect.signature(kind).parameters
    for name in options:
        if name not in accepted:
            raise UnknownName(
                f"SOLVER.OPTIMIZER_ARGS: {cfg.SOLVER.OPTIMIZER} takes no {name!r}{did_you_mean(name, accepted)} "
                f"Accepted: {', '.join(accepted)}."
            )
    if "fused" in accepted:
        options.setdefault("fused", True)
    return kind([group for group in groups if group["params"]], **options)


def _optimizer_class(name: str) -> Any:
    kind = getattr(torch.optim, name, None)
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer):
        return kind
    import timm.optim

    if name in timm.optim.list_optimizers():
        return timm.optim.get_optimizer_class(name, bind_defaults=False)
    from_timm: list[str] = timm.optim.list_optimizers()  # type: ignore[assignment]
    known = [n for n, v in vars(torch.optim).items() if inspect.isclass(v) and n != "Optimizer"]
    raise UnknownName(
        f"SOLVER.OPTIMIZER: {name!r} is unknown{did_you_mean(name, [*known, *from_timm])} "
        f"A class of torch.optim ({', '.join(known)}) or a name of timm.optim is accepted."
    )


def build_schedule(cfg: Any, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The schedule of `SOLVER`, to be stepped after every optimiser step.

    Raises:
        ValueError: unknown `SOLVER.SCHEDULE`.
    """
    schedule = _schedule(cfg.SOLVER)
    return LambdaLR(optimizer, lambda step: _factor(cfg.SOLVER, schedule, step))


def learning_rate_factor(cfg: Any, step: int) -> float:
    """Factor on `BASE_LR` at an optimiser step of the run: the warm-up times the schedule.

    Raises:
        ValueError: unknown `SOLVER.SCHEDULE`.
    """
    return _factor(cfg.SOLVER, _schedule(cfg.SOLVER), step)


def _factor(solver: Any, schedule: Callable[[float], float], step: int) -> float:
    epoch = step / solver.ITERS_PER_EPOCH
    warm = 1.0
    if epoch < solver.WARMUP_EPOCHS:
        warm = solver.WARMUP_FACTOR + (1.0 - solver.WARMUP_FACTOR) * epoch / solver.WARMUP_EPOCHS
    return warm * schedule(epoch)


def _schedule(solver: Any) -> Callable[[float], float]:
    """Epoch, with a fraction → factor without the warm-up."""
    if solver.SCHEDULE == "cosine":
        cosine = CosineParamScheduler(1.0, solver.MIN_LR / solver.BASE_LR)
        length = max(1e-9, solver.EPOCHS - solver.WARMUP_EPOCHS)
        return lambda epoch: cosine(min(1.0, max(0.0, epoch - solver.WARMUP_EPOCHS) / length))
    if solver.SCHEDULE == "step":
        return _decays(solver.GAMMA, range(solver.STEP_EPOCHS, solver.EPOCHS + 1, solver.STEP_EPOCHS))
    if solver.SCHEDULE == "milestones":
        return _decays(solver.GAMMA, solver.MILESTONES)
    if solver.SCHEDULE == "constant":
        return lambda epoch: 1.0
    raise InvalidValue(
        f"SOLVER.SCHEDULE: {solver.SCHEDULE!r} is unknown{did_you_mean(solver.SCHEDULE, SCHEDULES)} "
        f"Accepted: {', '.join(SCHEDULES)}."
    )


def _decays(gamma: float, epochs: Sequence[int]) -> Callable[[float], float]:
    """Epoch → gamma to the power of how many of `epochs` have begun."""
    begins = sorted({epoch for epoch in epochs if epoch > 0})
    end = max(begins, default=0) + 1
    values = [gamma ** sum(given <= epoch for given in epochs) for epoch in (0, *begins)]
    steps = MultiStepParamScheduler(values, end, begins)
    return lambda epoch: steps(min(int(epoch), end) / end)


def precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of mixed precision, or None for float32.

    Args:
        name: `bfloat16`, `float16`, `none`, or `auto`: bfloat16 on a GPU that computes in it, and on a CPU where it is
            faster by measurement, see `cpu_precision.faster_precision`; else None.

    Raises:
        ValueError: unknown name.
    """
    if name == "auto":
        if device.type == "cpu":
            return comm.on_first_rank(faster_precision)
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if name not in PRECISIONS:
        raise InvalidValue(f"SOLVER.AMP: {name!r} is unknown; accepted: auto, {', '.join(PRECISIONS)}.")
    return PRECISIONS[name]
