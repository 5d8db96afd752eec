"""Images to features: the one way for clustering, evaluation, export and search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastreid_uns.data.image_set import ImageSet
from fastreid_uns.errors import InvalidState, InvalidValue
from fastreid_uns.utils.comm import all_gather, broadcast_buffers, broadcast_object, rank, world
from fastreid_uns.utils.progress import progress

T = TypeVar("T")


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode that it had, also after an error."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in was_training.items():
            module.training = training


def extract_features(
    model: Any,
    images: ImageSet,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 256,
    amp: torch.dtype | None = None,
    what: str = "extract",
) -> dict[str, Tensor]:
    """Outputs of `model.extract` for all N images of a set, in the order of the set, equal on every rank.

    Whole batches are dealt out to the processes, so that an image meets the same batch whatever their number, and the
    results are gathered. Buffers (norm statistics) come from rank 0. The training mode of each module is restored.

    Args:
        model: a module with `extract(images) -> dict`, images (B,3,H,W) uint8, with `feats` (B,D) in the result.
        images: what to extract.
        device: where to compute; None = where the model is.
        batch_size: images in each forward pass.
        amp: bfloat16 or float16 computes under autocast, None in full precision.
        what: label of the progress bar.

    Returns:
        name -> (N, ...) on `device`, without gradient; half-precision outputs as float32.

    Raises:
        ValueError: the set is empty.
        RuntimeError: some `feats` are not finite.
    """
    if len(images) == 0:
        raise InvalidValue(f"{what}: the image set is empty; features need at least one image. Check the data root.")
    device = torch.device(device) if device is not None else _device_of(model)
    batches = [list(range(i, min(i + batch_size, len(images)))) for i in range(0, len(images), batch_size)]
    mine = share(batches)
    broadcast_buffers(model)
    with evaluation_mode(model), torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        whole = len(batches[0]) if device.type == "cuda" else 0
        outputs = _forward_all(model.extract, images.stream(mine, device), mine, what, whole)
    gathered = _gather(outputs, device)
    _check_finite(gathered["feats"], images, what)
    return gathered


def share(items: list[T]) -> list[T]:
    """The contiguous part of `items` that falls to this process; rank 0 has one of each non-empty list."""
    first, end = (-(-len(items) * r // world()) for r in (rank(), rank() + 1))
    return items[first:end]


def _forward_all(
    extract: Callable[[Tensor], dict[str, Tensor]],
    stream: Iterable[Tensor],
    batches: list[list[int]],
    what: str,
    whole: int,
) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    done, rows = 0, sum(map(len, batches))
    for batch in progress(stream, what, total=len(batches)) if rank() == 0 else stream:
        for name, value in extract(_filled(batch, whole)).items():
            value = value[: len(batch)]
            value = value.float() if value.is_floating_point() else value
            if name not in outputs:
                outputs[name] = value.new_empty((rows, *value.shape[1:]))
            outputs[name][done : done + len(value)] = value
        done += len(batch)
    return outputs


def _filled(batch: Tensor, whole: int) -> Tensor:
    """A last batch filled up with black images: for another size a GPU would choose, or compile, its kernels anew."""
    return F.pad(batch, [0, 0] * (batch.dim() - 1) + [0, whole - len(batch)]) if len(batch) < whole else batch


def _gather(outputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Rows of all ranks; a rank without a batch learns names and shapes from those that had one."""
    if world() == 1:
        return outputs
    layout = broadcast_object({name: (value.shape[1:], value.dtype) for name, value in outputs.items()})
    empty = {name: torch.empty((0, *shape), dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}
    return {name: all_gather(outputs.get(name, empty[name])) for name in layout}


def _check_finite(feats: Tensor, images: ImageSet, what: str) -> None:
    bad = (~feats.isfinite()).flatten(1).any(1).nonzero().flatten()
    if len(bad) > 0:
        raise InvalidState(
            f"{what}: {len(bad):,} of {len(feats):,} images have features that are not finite, the first is "
            f"{images.paths[int(bad[0])]}. The weights have diverged or are broken: lower SOLVER.BASE_LR, or compute "
            f"without half precision."
        )


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
