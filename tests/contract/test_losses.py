"""What every registered loss must do, on the tensors that the default model offers."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from fastreid_uns import builtin  # noqa: F401
from fastreid_uns.registry import LOSS_REGISTRY

NAMES = [name for name, _ in LOSS_REGISTRY]


def loss_inputs(dtype: torch.dtype = torch.float32, clusters: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    feats = F.normalize(torch.randn(12, 8, generator=generator))
    return {
        "feats": feats.to(dtype),
        "teacher_feats": F.normalize(torch.randn(12, 8, generator=generator)).to(dtype),
        "logits": torch.randn(12, clusters, generator=generator).to(dtype),
        "teacher_logits": torch.randn(12, clusters, generator=generator).to(dtype),
        "labels": torch.arange(12) % clusters,
    }


def arguments(loss, tensors):
    wanted = inspect.signature(loss.forward).parameters
    if not set(wanted) <= set(tensors):
        pytest.skip(f"wants {set(wanted) - set(tensors)}, which only its own model offers")
    return {name: tensors[name] for name in wanted}


@pytest.mark.parametrize("name", NAMES)
def test_scalar_that_does_not_depend_on_the_order_of_the_batch(name):
    loss = LOSS_REGISTRY.get(name)()
    values = arguments(loss, loss_inputs())
    mixed = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    result = loss(**values)
    assert result.shape == ()
    torch.testing.assert_close(loss(**{key: value[mixed] for key, value in values.items()}), result)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_equals_finite_differences(name):
    loss = LOSS_REGISTRY.get(name)()
    values = arguments(loss, loss_inputs(torch.float64))
    first = next(key for key, value in values.items() if value.is_floating_point())
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
