"""The momentum encoder (teacher): a copy that follows slowly."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from fastreid_uns.errors import InvalidValue

Module = TypeVar("Module", bound=nn.Module)

BUFFER_POLICIES = ("own", "copy", "average")


def momentum_copy(module: Module) -> Module:
    """A copy without gradients, equal to `module` at first."""
    teacher = copy.deepcopy(module)
    teacher.requires_grad_(False)
    return teacher


def check_buffer_policy(buffers: str) -> None:
    """Raise a ValueError unless `update_momentum` knows the policy."""
    if buffers not in BUFFER_POLICIES:
        raise InvalidValue(f"MODEL.MOMENTUM_BUFFERS: {buffers!r} is unknown; accepted: {', '.join(BUFFER_POLICIES)}.")


@torch.no_grad()
def update_momentum(teacher: nn.Module, online: nn.Module, momentum: float, buffers: str = "own") -> None:
    """Move the teacher's parameters towards the online ones, in place.

    Args:
        momentum: weight of the old value, in [0, 1].
        buffers: what becomes of norm statistics: `own` leaves them alone (the teacher runs in train mode and gathers
            its own, as in MoCo and MMT), `copy` takes the online ones, `average` moves them like parameters.

    Raises:
        ValueError: unknown buffer policy.

    Source: He et al. 2020 (MoCo), eq. 2.
    """
    check_buffer_policy(buffers)
    torch._foreach_lerp_(list(teacher.parameters()), [p.detach() for p in online.parameters()], 1.0 - momentum)
    if buffers == "own":
        return
    pairs = list(zip(teacher.buffers(), online.buffers(), strict=True))
    averaged = [pair for pair in pairs if buffers == "average" and pair[0].is_floating_point()]
    copied = [pair for pair in pairs if not (buffers == "average" and pair[0].is_floating_point())]
    if averaged:
        torch._foreach_lerp_([old for old, _ in averaged], [new for _, new in averaged], 1.0 - momentum)
    if copied:
        torch._foreach_copy_([old for old, _ in copied], [new for _, new in copied])
