"""The few collective operations that the framework needs; each does nothing in a single process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastreid_uns.errors import InvalidState

T = TypeVar("T")


def init_from_environment(device: str) -> torch.device:
    """Join the process group that `torchrun` describes, and give the device of this process.

    Args:
        device: `cuda`, `cpu` or `auto` (CUDA where there is one).

    Raises:
        RuntimeError: CUDA was asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InvalidState(f"MODEL.DEVICE is {device} but torch finds no CUDA device; set MODEL.DEVICE cpu or auto.")
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if device == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(place)
        return place
    return torch.device(device)


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all processes."""
    if world() > 1:
        dist.barrier()


def broadcast_object(value: T) -> T:
    """The value that rank 0 holds, on every rank."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, on every rank."""
    if world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    dist.all_gather_object(box, value)
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
    return nn.parallel.DistributedDataParallel(
        model,
        broadcast_buffers=False,
        find_unused_parameters=find_unused,
    )
