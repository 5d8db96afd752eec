"""Parameter groups, optimiser, schedule and precision."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from fastreid_uns.engine.cpu_precision import faster_precision
from fastreid_uns.errors import InvalidValue, UnknownName, shown
from fastreid_uns.registry import did_you_mean
from fastreid_uns.utils import comm

logger = logging.getLogger(__name__)

SCHEDULES = ("step", "milestones", "cosine", "constant")
_OWN_KEYS = {  # arguments of optimisers → the key that gives them
    "params": "the model and SOLVER.FREEZE",
    "lr": "SOLVER.BASE_LR",
    "weight_decay": "SOLVER.WEIGHT_DECAY",
}
_UNFIT = {
    "LBFGS": "evaluates the loss several times in a step, which a training step cannot",
    "SparseAdam": "takes sparse gradients, which no network here has",
}
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "none": None}


def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that `SOLVER` names, over all parameters that need a gradient.

    Norm weights and biases (parameters with at most one dimension) decay by `WEIGHT_DECAY_NORM`. Parameters whose name
    begins as a key of `RATE_FACTORS` have that factor on their rate.

    Raises:
        KeyError: neither torch.optim nor timm knows the name; no parameter that trains has the name.
        ValueError: a factor that is no positive number, arguments that the optimiser does not accept, an optimiser
            that cannot train a network, or no parameter trains.
    """
    groups = _groups(cfg.SOLVER, model)
    name, given = cfg.SOLVER.OPTIMIZER, cfg.SOLVER.OPTIMIZER_ARGS
    kind = _optimizer_class(name)
    for argument in given.keys() & _OWN_KEYS.keys():
        raise InvalidValue(
            f"SOLVER.OPTIMIZER_ARGS: {argument} is given by {_OWN_KEYS[argument]}. Take it out and set that."
        )
    options = {"lr": cfg.SOLVER.BASE_LR, **given}
    accepted = inspect.signature(kind).parameters
    for argument in options:
        if argument not in accepted:
            raise UnknownName(
                f"SOLVER.OPTIMIZER_ARGS: {name} takes no {argument!r}{did_you_mean(argument, accepted)} "
                f"Accepted: {', '.join(accepted)}."
            )
    if "fused" in accepted:
        options.setdefault("fused", True)
    try:
        return kind(groups, **options)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidValue(
            f"SOLVER.OPTIMIZER_ARGS is {shown(dict(given))}, which {name} does not accept "
            f"({type(error).__name__}: {error}). See the documentation of {name}."
        ) from error


def _groups(solver: Any, model: nn.Module) -> list[dict[str, Any]]:
    """The parameters that train, by factor on their rate and by decay, those of factor 1 first."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise InvalidValue("SOLVER.FREEZE leaves no parameter that trains. Take a name out of it.")
    factors = _rate_factors(solver.RATE_FACTORS, named)
    groups = []
    for factor in sorted({1.0, *factors.values()}, key=lambda factor: (factor != 1.0, factor)):
        own = [p for name, p in named.items() if factors.get(name, 1.0) == factor]
        for params, decay in (
            ([p for p in own if p.ndim > 1], solver.WEIGHT_DECAY),
            ([p for p in own if p.ndim <= 1], solver.WEIGHT_DECAY_NORM),
        ):
            if params:
                groups.append({"params": params, "lr": solver.BASE_LR * factor, "weight_decay": decay})
    return groups


def _rate_factors(given: Mapping[str, Any], names: Iterable[str]) -> dict[str, float]:
    """Name of a parameter → factor on its rate, of those for which `given` has one."""
    factors: dict[str, float] = {}
    for prefix in sorted(given, key=len):
        factor, where = given[prefix], f"SOLVER.RATE_FACTORS: {prefix}"
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
            raise InvalidValue(
                f"{where} is {shown(factor)}; a number above 0 is accepted. SOLVER.FREEZE keeps parts as they are."
            )
        own = _named(prefix, names, "SOLVER.RATE_FACTORS")
        factors |= dict.fromkeys(own, float(factor))
        logger.info("%s: %d tensors with %s times the rate", where, len(own), factor)
    return factors


def freeze(cfg: Any, model: nn.Module) -> None:
    """Parameters whose name begins as an entry of `SOLVER.FREEZE` get no gradient; a name ends at a full stop.

    Their norm statistics still move, see `MODEL.FREEZE_NORM`.

    Raises:
        KeyError: no parameter has the name.
    """
    parameters = dict(model.named_parameters())
    for prefix in cfg.SOLVER.FREEZE:
        own = _named(prefix, parameters, "SOLVER.FREEZE")
        for name in own:
            parameters[name].requires_grad_(False)
        logger.info("SOLVER.FREEZE: %s, %d tensors do not train", prefix, len(own))


def _named(prefix: str, names: Iterable[str], key: str) -> list[str]:
    """Names that are `prefix` or go on after it with a full stop; at least one."""
    own = [name for name in names if name == prefix or name.startswith(f"{prefix}.")]
    if own:
        return own
    known = {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
    short = sorted(name for name in known if name.count(".") < 2)
    raise UnknownName(
        f"{key}: {prefix!r} begins the name of no parameter that trains{did_you_mean(prefix, sorted(known))} Names "
        f"begin with {', '.join(short)}."
    )


def _optimizer_class(name: str) -> Any:
    if name in _UNFIT:
        raise InvalidValue(f"SOLVER.OPTIMIZER: {name} {_UNFIT[name]}. Choose another one, such as Adam or SGD.")
    kind = getattr(torch.optim, name, None)
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer):
        return kind
    import timm.optim

    if name in timm.optim.list_optimizers():
        return timm.optim.get_optimizer_class(name, bind_defaults=False)
    from_timm: list[str] = timm.optim.list_optimizers()  # type: ignore[assignment]
    known = [n for n, v in vars(torch.optim).items() if inspect.isclass(v) and n not in ("Optimizer", *_UNFIT)]
    raise UnknownName(
        f"SOLVER.OPTIMIZER: {name!r} is unknown{did_you_mean(name, [*known, *from_timm])} "
        f"A class of torch.optim ({', '.join(known)}) or a name of timm.optim is accepted."
    )


def build_schedule(cfg: Any, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """The schedule of `SOLVER`, to be stepped after every optimiser step, or epoch if `ITERS_PER_EPOCH` is 0.

    Raises:
        ValueError: unknown `SOLVER.SCHEDULE`.
    """
    schedule = _schedule(cfg.SOLVER)
    return LambdaLR(optimizer, lambda step: _factor(cfg.SOLVER, schedule, step))


def learning_rate_factor(cfg: Any, step: int) -> float:
    """Factor on `BASE_LR` at an optimiser step of the run (an epoch if `ITERS_PER_EPOCH` is 0): warm-up x schedule.

    Raises:
        ValueError: unknown `SOLVER.SCHEDULE`.
    """
    return _factor(cfg.SOLVER, _schedule(cfg.SOLVER), step)


def _factor(solver: Any, schedule: Callable[[float], float], step: int) -> float:
    epoch = step / (solver.ITERS_PER_EPOCH or 1)
    warm = 1.0
    if epoch < solver.WARMUP_EPOCHS:
        risen = int(epoch) if solver.WARMUP_BY == "epoch" else epoch
        warm = solver.WARMUP_FACTOR + (1.0 - solver.WARMUP_FACTOR) * risen / solver.WARMUP_EPOCHS
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
