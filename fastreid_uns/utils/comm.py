"""The few collective operations that the framework needs; each does nothing in a single process."""

from __future__ import annotations

import atexit
import inspect
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastreid_uns.errors import FailedElsewhere, InvalidState, InvalidValue, UserError
from fastreid_uns.utils.watch import Watch

T = TypeVar("T")

_PATIENCE = timedelta(days=7)  # of waiting for an object of rank 0, which may cluster for hours; the watch sees to it
_objects: dist.ProcessGroup | None = None  # gloo, so that an object needs no GPU; None = the default group
_watch: Watch | None = None


def init_from_environment(device: str, timeout_minutes: float = 30.0) -> torch.device:
    """Join the process group that `torchrun` describes, and give the device of this process.

    Args:
        device: `cuda`, `cpu` or `auto` (CUDA where there is one).
        timeout_minutes: after which a process that stands still ends the others, see `watch.Watch`.

    Raises:
        RuntimeError: CUDA was asked for and there is none, or fewer devices than processes.
    """
    place = choose_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        _join(place, timeout_minutes)
    return place


def choose_device(device: str) -> torch.device:
    """The device that `MODEL.DEVICE` or `--device` names: `auto` is CUDA where there is one.

    Raises:
        InvalidState: CUDA or MPS was asked for and there is none, or fewer devices than processes.
        InvalidValue: there is no such kind of device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not device.startswith("cuda"):
        try:
            place = torch.device(device)
        except RuntimeError as error:
            raise InvalidValue(f"device: {device!r} is unknown; choose one of auto, cpu and cuda.") from error
        if place.type == "mps" and not torch.backends.mps.is_available():
            raise InvalidState("device: mps was asked for, but torch finds no GPU of Apple; set it to cpu or auto.")
        return place
    if not torch.cuda.is_available():
        raise InvalidState(f"device: {device} was asked for, but torch finds no CUDA device; set it to cpu or auto.")
    place = torch.device(device) if ":" in device else torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if place.index >= torch.cuda.device_count():
        raise InvalidState(
            f"MODEL.DEVICE: process {os.environ.get('RANK', 0)} needs {place}, but torch finds "
            f"{torch.cuda.device_count()} CUDA device(s). Start fewer processes with --num-gpus."
        )
    torch.cuda.set_device(place)
    return place


def _join(place: torch.device, timeout_minutes: float) -> None:
    global _objects, _watch
    limit = timedelta(minutes=2 * timeout_minutes)  # the watch, whose messages say more, comes first
    if place.type == "cuda":
        dist.init_process_group("nccl", timeout=limit, device_id=place)
    else:
        dist.init_process_group("gloo", timeout=limit)
    if world() > 1:
        _objects = dist.new_group(backend="gloo", timeout=_PATIENCE)  # type: ignore[assignment]
        _watch = Watch.from_environment(60.0 * timeout_minutes)
    atexit.register(shutdown)


def shutdown() -> None:
    """Leave the process group; also done when Python ends."""
    global _objects, _watch
    if _watch is not None:
        _watch.stop()
    if dist.is_initialized():
        dist.destroy_process_group()
    _objects = _watch = None


def report(step: int, stage: str) -> None:
    """Note what this process does, for the message that others give if it stands still; costs nothing.

    Args:
        step: optimiser steps done in the whole run, equal on all ranks at equal moments.
        stage: in words.
    """
    if _watch is not None:
        _watch.report(step, stage)


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier(group=_objects)


def broadcast_object(value: T) -> T:
    """The value that rank 0 holds, on every rank."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, group=_objects)
    return box[0]


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` gives on rank 0, on every rank; the others wait for it.

    Raises:
        RuntimeError: on the other ranks, if it raises a `UserError` on rank 0.
    """
    if world() == 1:
        return action()
    result, failure = None, None
    if rank() == 0:
        try:
            result = action()
        except UserError as error:
            failure = error
    result, reason = broadcast_object((result, str(failure) if failure else None))
    if failure is not None:
        raise failure
    if reason is not None:
        raise FailedElsewhere(f"process 0: {reason}")
    return result  # type: ignore[return-value]


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, on every rank."""
    if world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    dist.all_gather_object(box, value, group=_objects)
    return box


def gather_on(target: int, value: T) -> list[T] | None:
    """The values of all ranks on one of them, None on the others."""
    if world() == 1:
        return [value]
    box: list[Any] | None = [None] * world() if rank() == target else None
    dist.gather_object(value, box, dst=target, group=_objects)
    return box


def all_gather(value: Tensor, equal: bool = False) -> Tensor:
    """Rows of all ranks, in order of rank, without gradient.

    Args:
        equal: all ranks hold as many rows, as they do in a training step; then the host does not wait for the device.
    """
    if world() == 1:
        return value
    if equal:
        every = value.new_empty((world(), *value.shape))
        dist.all_gather(list(every.unbind()), value.contiguous())
        return every.flatten(0, 1)
    count = torch.tensor([len(value)], device=value.device)
    counts = [torch.empty_like(count) for _ in range(world())]
    dist.all_gather(counts, count)
    rows = [int(c) for c in counts]
    padded = value.new_zeros((max(rows), *value.shape[1:]))
    padded[: len(value)] = value
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.rows = len(value)
        parts = [torch.empty_like(value, memory_format=torch.contiguous_format) for _ in range(world())]
        dist.all_gather(parts, value.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def all_gather_with_gradient(value: Tensor) -> Tensor:
    """Rows of all ranks, in order of rank; every rank must hold as many.

    The gradient of a row is the sum of what all ranks made of it. So where each computes the same scalar from all rows,
    DistributedDataParallel, which averages over the ranks, gives the gradient of that scalar, as one process would.
    """
    return value if world() == 1 else _GatherRows.apply(value)


def mean_over_ranks(values: Sequence[float]) -> list[float]:
    """Element-wise mean of numbers over all ranks."""
    return torch.tensor(gather_objects(list(values)), dtype=torch.float64).mean(0).tolist()


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the buffers of rank 0, so that all evaluate with the same normalisation statistics."""
    if world() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def wrap(model: nn.Module, device: torch.device, find_unused: bool) -> nn.Module:
    """The model under DistributedDataParallel when there are several processes, else the model itself.

    Buffers are not broadcast in each forward pass: memories are equal on all ranks by construction, and norm
    statistics are broadcast by `broadcast_buffers` before each extraction.
    """
    if world() == 1:
        return model
    kind = nn.parallel.DistributedDataParallel
    key = (
        "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(kind).parameters else "broadcast_buffers"
    )
    return kind(model, find_unused_parameters=find_unused, **{key: False})  # type: ignore[arg-type]
