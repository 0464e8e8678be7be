"""Activations and batch norms fused into the linear layer or convolution beside them: less time, less memory.

Of an activation before a layer autograd keeps the input, not the output. Each is one `torch.autograd.Function`, which
costs a fraction of a checkpoint's bookkeeping; the backward pass computes the activation again. Under `torch.compile`,
tracing, `torch.func` transforms and without autograd they are the plain operators, which compilers fuse by themselves.

They read a layer's weights and do not call it: hooks of that layer, and wrappers around it, do not act.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from zoo.recompute import is_plain

aten = torch.ops.aten
ACTIVATIONS = {  # the function and its backward, (gradient, input) -> gradient
    "gelu": (F.gelu, aten.gelu_backward),
    "hardswish": (F.hardswish, aten.hardswish_backward),
}


def activated_linear(activation: str, weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
    """``linear(activation(cat(parts, -1)), weight, bias)`` without the concatenation, (..., C_i) -> (..., out)."""
    shape = parts[0].shape[:-1]
    parts = tuple(part.flatten(0, -2) for part in parts)
    if is_plain():
        return _ActivatedLinear.compute(activation, weight, bias, parts).unflatten(0, shape)
    return _ActivatedLinear.apply(activation, weight, bias, *parts).unflatten(0, shape)


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def compute(activation: str, weight: Tensor, bias: Tensor | None, parts: tuple[Tensor, ...]) -> Tensor:
        function = ACTIVATIONS[activation][0]
        if weight.is_meta:  # a count sees one layer
            return F.linear(function(torch.cat(parts, -1)), weight, bias)
        first, *others = weight.split([part.shape[-1] for part in parts], 1)
        total = F.linear(function(parts[0]), first, bias)
        for part, columns in zip(parts[1:], others, strict=True):
            total = torch.addmm(total, function(part), columns.t())
        return total

    @staticmethod
    def forward(ctx: Any, activation: str, weight: Tensor, bias: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *parts)
        ctx.activation, ctx.has_bias = activation, bias is not None
        return _ActivatedLinear.compute(activation, weight, bias, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, *parts = ctx.saved_tensors
        function, function_backward = ACTIVATIONS[ctx.activation]
        columns = weight.to(grad.dtype).split([part.shape[-1] for part in parts], 1)  # under autocast they differ
        part_grads, weight_grads = [], []
        for index, (part, own) in enumerate(zip(parts, columns, strict=True)):
            if ctx.needs_input_grad[1]:
                weight_grads.append(grad.t() @ function(part).to(grad.dtype))
            part_grads.append(None)
            if ctx.needs_input_grad[3 + index]:
                part_grads[-1] = function_backward((grad @ own).to(part.dtype), part)
        weight_grad = torch.cat(weight_grads, 1).to(weight.dtype) if weight_grads else None
        bias_grad = grad.sum(0).to(weight.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return None, weight_grad, bias_grad, *part_grads


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
    """A depth-wise convolution (C, 1, k, k) of ``activation(x)`` that keeps the size, (B, C, H, W) -> the same."""
    if is_plain():
        return _Depthwise.compute(x, weight, bias, activation)
    return _Depthwise.apply(x, weight, bias, activation)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def compute(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        x = x if activation is None else ACTIVATIONS[activation][0](x)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.activation, ctx.has_bias = activation, bias is not None
        return _Depthwise.compute(x, weight, bias, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        hidden = x if ctx.activation is None else ACTIVATIONS[ctx.activation][0](x)
        hidden, kernel = hidden.to(grad.dtype), weight.to(grad.dtype)
        mask = [needs_x, needs_weight, needs_bias and ctx.has_bias]
        if grad.is_cpu and kernel.shape[-1] == 5 and needs_weight:
            x_grad = _convolution_backward(grad, hidden, kernel, 2, [needs_x, False, False])[0]
            weight_grad = _weight_grad_5x5(grad, hidden, kernel)
            bias_grad = grad.sum((0, 2, 3)) if mask[2] else None
        else:
            x_grad, weight_grad, bias_grad = _convolution_backward(grad, hidden, kernel, kernel.shape[-1] // 2, mask)
        if needs_x and ctx.activation is not None:
            x_grad = ACTIVATIONS[ctx.activation][1](x_grad.to(x.dtype), x)
        grads = (x_grad, x.dtype), (weight_grad, weight.dtype), (bias_grad, weight.dtype)
        return *(g if g is None else g.to(dtype) for g, dtype in grads), None


def _convolution_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, padding: int, mask: list[bool]
) -> tuple[Tensor | None, ...]:
    channels = len(kernel)
    options = [channels], [1, 1], [padding] * 2, [1, 1], False, [0, 0], channels
    return aten.convolution_backward(grad, x, kernel, *options, mask)


def _weight_grad_5x5(grad: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """The same from four 3x3 gradients, which meet in the middle: on a CPU several times as fast (measured)."""
    rows = []
    for top in (2, 0):
        left, right = (
            _convolution_backward(
                grad, F.pad(x, (side, 2 - side, top, 2 - top)), kernel[..., :3, :3], 0, [False, True, False]
            )[1]
            for side in (2, 0)
        )
        rows.append(torch.cat([left, right[..., 1:]], 3))
    return torch.cat([rows[0], rows[1][:, :, 1:]], 2)


def can_fold(conv: nn.Conv2d | nn.Linear, norm: nn.Module, x: Tensor) -> bool:
    """Whether `norm` is one affine map per channel now, and better folded into `conv` than applied after it.

    On meta tensors, which are there to be counted, it stands. Autograd would keep the folded weights, but not the
    norm's input: where the map has fewer positions than a kernel has inputs, that is no gain.
    """
    if x.is_meta or not is_affine(norm) or getattr(conv, "padding_mode", "zeros") != "zeros":
        return False
    positions = x.numel() // (conv.in_features if isinstance(conv, nn.Linear) else conv.in_channels)
    return is_plain() or positions >= conv.weight[0].numel()


def is_affine(norm: nn.Module) -> bool:
    """Whether `norm` is a batch norm that uses its running statistics."""
    return isinstance(norm, _BatchNorm) and norm.affine and norm.track_running_stats and not norm.training


def fold(conv: nn.Conv2d | nn.Linear, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the layer that is `conv` followed by `norm` in evaluation mode; differentiable."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    mean = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv.weight * scale.view(-1, *[1] * (conv.weight.ndim - 1)), torch.addcmul(norm.bias, mean, scale, value=-1)


def normed_conv(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """``norm(conv(x))``, in one step where that can be; (B, C, H, W) -> (B, out, ceil(H / stride), ...)."""
    if not can_fold(conv, norm, x):
        return norm(conv(x))
    weight, bias = fold(conv, norm)
    if conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.groups == 1:
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
