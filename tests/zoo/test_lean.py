"""What is fused or folded gives the plain operators' results and gradients, and keeps less for the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from zoo.lean import ACTIVATIONS, activated_linear, can_fold, depthwise, fold, normed_conv


def gradients(function, inputs):
    """The result, and the gradients of its weighted sum with respect to all inputs."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    result = function(*inputs)
    weights = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
    return [result, *torch.autograd.grad((result * weights).sum(), inputs)]


def saved_elements(function):
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        function()
    return sum(t.numel() for t in kept.values())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [(6,), (4, 2)])
def test_activated_linear(activation, widths):
    parts = [torch.randn(2, 3, 5, width, dtype=torch.float64) for width in widths]
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def plain(weight, bias, *parts):
        return F.linear(ACTIVATIONS[activation][0](torch.cat(parts, -1)), weight, bias)

    def ours(weight, bias, *parts):
        return activated_linear(activation, weight, bias, *parts)

    expected = gradients(plain, [weight, bias, *parts])
    torch.testing.assert_close(gradients(ours, [weight, bias, *parts]), expected)
    with torch.no_grad():
        torch.testing.assert_close(ours(weight, bias, *parts), expected[0])
    weight.requires_grad_()
    assert saved_elements(lambda: ours(weight, bias, *parts)) == weight.numel() + sum(p.numel() for p in parts)


@pytest.mark.parametrize("activation", [None, "hardswish"])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [(1, 1), (7, 4), (2, 9)])
def test_depthwise(activation, kernel, size):
    x = torch.randn(2, 6, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(6, 1, kernel, kernel, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def plain(x, weight, bias):
        x = x if activation is None else ACTIVATIONS[activation][0](x)
        return F.conv2d(x, weight, bias, padding=kernel // 2, groups=6)

    ours = gradients(lambda *t: depthwise(*t, activation), [x, weight, bias])
    torch.testing.assert_close(ours, gradients(plain, [x, weight, bias]))


def test_frozen_weights_get_no_gradient_and_cost_nothing():
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    weight, bias = torch.randn(4, 1, 5, 5), torch.randn(4)
    depthwise(x, weight, bias, "gelu").sum().backward()
    activated_linear("gelu", torch.randn(3, 6), None, x).sum().backward()
    assert x.grad.isfinite().all()
    assert weight.grad is None
    assert bias.grad is None


def test_under_autocast():
    parts = [torch.randn(2, 8, 4), torch.randn(2, 8, 4)]
    weight, bias = torch.randn(6, 8), torch.randn(6)
    image, kernel, shift = torch.randn(1, 4, 9, 9), torch.randn(4, 1, 5, 5), torch.randn(4)
    expected = gradients(lambda w, b, *p: activated_linear("gelu", w, b, *p), [weight, bias, *parts])
    expected += gradients(lambda *t: depthwise(*t, "gelu"), [image, kernel, shift])
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(lambda w, b, *p: activated_linear("gelu", w, b, *p), [weight, bias, *parts])
        got += gradients(lambda *t: depthwise(*t, "gelu"), [image, kernel, shift])
    assert got[0].dtype == torch.bfloat16
    for ours, precise in zip(got, expected, strict=True):
        assert (ours - precise).abs().max() <= 0.05 * precise.abs().max()


@pytest.mark.parametrize(("kernel", "stride", "groups", "bias"), [(1, 1, 1, False), (3, 2, 1, True), (3, 1, 4, True)])
def test_normed_conv(kernel, stride, groups, bias):
    conv = nn.Conv2d(4, 8, kernel, stride, kernel // 2, groups=groups, bias=bias).double()
    norm = nn.BatchNorm2d(8).double()
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2)
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    for training in (True, False):
        norm.train(training)
        before = norm.running_mean.clone()
        expected = gradients(lambda x, *_: norm(conv(x)), [x])
        norm.running_mean.copy_(before)
        torch.testing.assert_close(gradients(lambda x, *_: normed_conv(x, conv, norm), [x]), expected)
        assert can_fold(conv, norm, x) != training
    parameters = [*conv.parameters(), *norm.parameters()]
    expected = torch.autograd.grad(norm(conv(x)).square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(normed_conv(x, conv, norm).square().sum(), parameters), expected)


def test_where_a_norm_is_not_folded():
    conv, norm, x = nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8).eval(), torch.randn(1, 64, 8, 8)
    assert can_fold(conv, norm, x)
    assert not can_fold(conv, norm, x.to("meta"))  # a count sees the network as defined
    assert not can_fold(conv, nn.BatchNorm2d(8, track_running_stats=False).eval(), x)
    assert not can_fold(conv, nn.Identity(), x)
    few = x[..., :4, :4]  # 16 positions, 64 inputs: autograd would keep more
    assert not can_fold(conv, norm, few)
    with torch.no_grad():
        assert can_fold(conv, norm, few)
    assert fold(nn.Linear(4, 8), norm)[0].shape == (8, 4)
