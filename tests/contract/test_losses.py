"""What every registered loss must do, on everything that the models of the core and of the projects offer."""

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns import builtin  # noqa: F401
from fastreid_uns.modeling.proxies import CameraProxies
from fastreid_uns.registry import LOSS_REGISTRY

NAMES = [name for name, _ in LOSS_REGISTRY]


def loss_inputs(dtype: torch.dtype = torch.float32, clusters: int = 3) -> dict[str, Any]:
    """Twelve images, two of each cluster side by side, under every name that a model of any project offers."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape: int) -> torch.Tensor:
        return F.normalize(torch.randn(*shape, generator=generator), dim=-1).to(dtype)

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    labels = torch.arange(12) // 2 % clusters
    cameras = torch.arange(12) % 2
    proxies = CameraProxies(8)
    proxies.reset(unit(12, 8).float(), labels, cameras)
    return {
        "feats": unit(12, 8),
        "teacher_feats": unit(12, 8),
        "weak_feats": unit(12, 8),
        "logits": real(12, clusters),
        "teacher_logits": real(12, clusters),
        "supports": unit(12, 8),
        "support_logits": real(12, clusters),
        "pooled": real(12, 16),
        "teacher_pooled": real(12, 16),
        "unnormalized": real(12, 8),
        "parts": unit(12, 3, 8),
        "unnormalized_parts": real(12, 3, 8),
        "part_logits": real(12, 3, clusters),
        "class_logits": real(12, clusters),
        "part_class_logits": real(12, 3, clusters),
        "neighbours": torch.stack([torch.arange(12) // 2, (torch.arange(12) // 2 + 1) % 7, torch.full((12,), -1)], 1),
        "neighbour_distance": torch.rand(12, 3, generator=generator).to(dtype),
        "agreement": torch.rand(12, 3, generator=generator).to(dtype),
        "labels": labels,
        "index": torch.arange(12) // 2,  # two views of each image
        "cameras": cameras,
        "domains": (torch.arange(12) >= 8).long(),  # the last four rows are of a labelled source
        "proxies": proxies,
        "epoch": 9,  # late enough for every loss that begins otherwise
        "progress": 0.5,
    }


def arguments(loss: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs[name] for name in inspect.signature(loss.forward).parameters}


def of_the_batch(value: Any) -> bool:
    """Whether an input has a row for each image."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


@pytest.mark.parametrize("name", [name for name in NAMES if getattr(LOSS_REGISTRY.get(name), "order_free", True)])
def test_scalar_that_does_not_depend_on_the_order_of_the_batch(name):
    loss = LOSS_REGISTRY.get(name)()
    values = arguments(loss, loss_inputs())
    mixed = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    result = loss(**values)
    assert result.shape == ()
    values = {key: value[mixed] if of_the_batch(value) else value for key, value in values.items()}
    torch.testing.assert_close(loss(**values), result)


@pytest.mark.parametrize("name", [name for name in NAMES if not getattr(LOSS_REGISTRY.get(name), "self_taught", False)])
def test_gradient_equals_finite_differences(name):
    loss = LOSS_REGISTRY.get(name)()
    values = arguments(loss, loss_inputs(torch.float64))
    first = next(key for key, value in values.items() if of_the_batch(value) and value.is_floating_point())
    values[first].requires_grad_()
    loss(**values).backward()
    direction = torch.randn(values[first].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step = 1e-6
    with torch.no_grad():
        up, down = ({**values, first: values[first] + sign * step * direction} for sign in (1, -1))
        slope = (loss(**up) - loss(**down)) / (2 * step)
    torch.testing.assert_close((values[first].grad * direction).sum(), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near_float32(name, dtype):
    loss = LOSS_REGISTRY.get(name)()
    exact = loss(**arguments(loss, loss_inputs()))
    torch.testing.assert_close(loss(**arguments(loss, loss_inputs(dtype))).float(), exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_one_cluster_is_finite(name):
    loss = LOSS_REGISTRY.get(name)()
    assert torch.isfinite(loss(**arguments(loss, loss_inputs(clusters=1))))
