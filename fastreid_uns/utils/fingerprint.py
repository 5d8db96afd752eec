"""A number by which weights are recognised, whatever file they are in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """sha256 over names, kinds, shapes and values of weights, whatever file they were in."""
    whole = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return whole.hexdigest()
