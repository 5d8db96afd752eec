"""Depthwise convolutions that train in bfloat16 on a CPU without its slow gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise convolution whose gradients are computed in float32 under bfloat16 autocast on a CPU.

    Nothing else differs, neither the output nor the names in the `state_dict`. Those of bfloat16 are slow where the
    kernel is larger than 3 or the stride larger than 1: for 128 x 672 maps of 8 x 8 and a kernel of 5 one core of an
    AMD EPYC takes 181 ms for them, in float32 56 ms.

    Args:
        conv: the layer to replace; its parameters are taken over, not copied.
        pad: (x, kernel, stride) → padded x, where the layer pads by the size of its input; None = by `conv.padding`.
    """

    def __init__(self, conv: nn.Conv2d, pad: Callable[..., Tensor] | None) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            conv.padding,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",  # draws no numbers
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.pad = pad
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, h, w)."""
        if self.pad is not None:
            x = self.pad(x, self.kernel_size, self.stride)
        if not _trains_in_bfloat16(x):
            return super().forward(x)
        return _Convolution.apply(x, self.weight, self.bias, self.stride, self.padding)


def _trains_in_bfloat16(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") is torch.bfloat16
        and not torch.compiler.is_compiling()
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.stride, ctx.padding, ctx.biased, ctx.dtype = stride, padding, bias is not None, x.dtype
        x = x.bfloat16()
        ctx.save_for_backward(x, weight)
        rounded = None if bias is None else bias.bfloat16()
        return torch.conv2d(x, weight.bfloat16(), rounded, stride, padding, 1, len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """(B, C, h, w) → those of x, in its precision, and of weight and bias, in float32."""
        x, weight = ctx.saved_tensors
        channels = len(weight)
        of_x, of_weight, of_bias = torch.ops.aten.convolution_backward(
            *(gradient.float(), x.float(), weight.float(), [channels] if ctx.biased else None),
            *(ctx.stride, ctx.padding, (1, 1), False, (0, 0), channels),
            (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.biased and ctx.needs_input_grad[2]),
        )
        return of_x if of_x is None else of_x.to(ctx.dtype), of_weight, of_bias, None, None


def float32_gradients_of_depthwise(model: nn.Module) -> nn.Module:
    """Replace the depthwise convolutions of a model whose gradients in bfloat16 are slow on a CPU.

    Args:
        model: changed in place.

    Returns:
        The model; another module only if the model itself is such a convolution.
    """
    if isinstance(model, nn.Conv2d):
        return _converted(model)
    for name, child in model.named_children():
        new = float32_gradients_of_depthwise(child)
        if new is not child:
            setattr(model, name, new)
    return model


def _converted(conv: nn.Conv2d) -> nn.Conv2d:
    plain = conv.padding_mode == "zeros" and conv.dilation == (1, 1) and not isinstance(conv.padding, str)
    depthwise = 1 < conv.groups == conv.in_channels == conv.out_channels
    slow = max(conv.kernel_size) > 3 or max(conv.stride) > 1
    if not (plain and depthwise and slow):
        return conv
    from timm.layers import Conv2dSame, pad_same

    pads: dict[type, Callable[..., Tensor] | None] = {nn.Conv2d: None, Conv2dSame: pad_same}
    return DepthwiseConv2d(conv, pads[type(conv)]) if type(conv) in pads else conv
