"""Depthwise convolutions: the same outputs and names, gradients of float32, the random numbers left alone."""

import copy

import pytest
import torch
from timm.layers import Conv2dSame
from torch import nn

from fastreid_uns.modeling.depthwise import DepthwiseConv2d, float32_gradients_of_depthwise

CONVS = {
    "kernel 5": lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False),
    "stride 2": lambda: nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6),
    "padded by size": lambda: Conv2dSame(6, 6, 3, stride=2, groups=6, bias=False),
}


def inputs(dtype=torch.float32):
    return torch.randn(4, 6, 9, 7, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def trained(conv, images, dtype):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        made = conv(images)
    (made.float() * torch.linspace(-1, 1, made.numel()).reshape(made.shape)).sum().backward()
    return made


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_outputs_stay_and_gradients_are_those_of_float32(name, given):
    torch.manual_seed(0)
    plain = CONVS[name]()
    own = float32_gradients_of_depthwise(copy.deepcopy(plain))
    assert isinstance(own, DepthwiseConv2d)
    a, b, exact = inputs(given), inputs(given), inputs(given).detach().float().requires_grad_()
    expected, found = trained(plain, a, torch.bfloat16), trained(own, b, torch.bfloat16)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert b.grad.dtype == given
    assert not torch.equal(own.weight.grad, own.weight.grad.bfloat16().float())
    reference = copy.deepcopy(plain)
    reference.zero_grad()
    trained(reference, exact, torch.float32)
    for key, gradient in [("x", b.grad), *((key, value.grad) for key, value in own.named_parameters())]:
        right = exact.grad if key == "x" else dict(reference.named_parameters())[key].grad
        assert (gradient.float() - right).norm() < 0.01 * right.norm(), key


def test_without_autocast_nothing_is_rounded():
    plain = CONVS["kernel 5"]()
    own = float32_gradients_of_depthwise(copy.deepcopy(plain))
    a, b = inputs(), inputs()
    assert torch.equal(trained(own, b, torch.float32), trained(plain, a, torch.float32))
    assert torch.equal(a.grad, b.grad)
    assert torch.equal(own.weight.grad, plain.weight.grad)


def test_only_slow_depthwise_convolutions_are_replaced():
    model = nn.Sequential(
        nn.Conv2d(6, 6, 3, padding=1, groups=6),  # fast enough as it is
        nn.Conv2d(6, 6, 5, padding=2),
        nn.Conv2d(6, 12, 5, groups=6),
        nn.Conv2d(6, 6, 5, padding="same", groups=6),
        nn.Conv2d(6, 6, 5, dilation=2, groups=6),
        nn.Sequential(nn.Conv2d(6, 6, 5, groups=6)),
    )
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    assert float32_gradients_of_depthwise(model) is model
    assert torch.equal(torch.get_rng_state(), state)
    assert [isinstance(module, DepthwiseConv2d) for module in model[:5]] == [False] * 5
    assert isinstance(model[5][0], DepthwiseConv2d)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_built_model_has_them():
    from fastreid_uns.config import load_config
    from fastreid_uns.modeling.meta_arch import build_model

    network = ['MODEL.BACKBONE={"NAME": "timm", "MODEL": "tf_efficientnet_lite0"}', "INPUT.SIZE=[32, 32]"]
    model = build_model(load_config("configs/quickstart.yaml", [*network, "MODEL.DEVICE=cpu"]), 8)
    kernels = [module.kernel_size for module in model.modules() if isinstance(module, DepthwiseConv2d)]
    # by the table of EfficientNet-B0: nine blocks with a kernel of 5, and two of 3 with a stride of 2
    assert kernels.count((5, 5)) == 9
    assert kernels.count((3, 3)) == 2
    assert len(kernels) == 11
