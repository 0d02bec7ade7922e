"""Three elementwise operations with a backward pass of their own.

In eager mode autograd keeps (and re-reads) an intermediate for every arithmetic step. These operations are a large part
of a small network's step and of a large network's activations, so each is one autograd node here that keeps its input
and recomputes the rest. Under `torch.compile` the plain formulas are used: the compiler fuses them itself.
Forward-mode derivatives (`torch.func.jvp`) go through the plain formulas too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension.

    x: (..., D); weight: (D,). Returns (..., D) in the dtype of x. float32 inside.
    """
    if _by_hand(x):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation, of any shape and dtype.

    `(1 + tanh(a)) / 2 = sigmoid(2a)`, and torch's sigmoid takes a third of the time of its tanh on a CPU.
    """
    return _GeluTanh.apply(x) if _by_hand(x) else F.gelu(x, approximate="tanh")


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift`, computed in float32 at least.

    x: (B, S, D), the S tokens being ordered frame by frame; shift, scale: (B or 1, F or 1, 1, D) float32, one row for
    all tokens of a frame. Returns (B, S, D) in the dtype of x.
    """
    if torch.compiler.is_compiling():
        return _modulated_layer_norm(x, shift, scale, eps)
    return _ModulatedLayerNorm.apply(x, shift, scale, eps)


def wide(x: Tensor) -> Tensor:
    """x in the precision to compute in: float32, or its own float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_hand(x: Tensor) -> bool:
    """Elsewhere torch's own fused kernels are as fast and keep as little."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling()


def _modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(wide(x), x.shape[-1:], None, None, eps)
    return torch.addcmul(shift, _by_frame(normed, scale), 1 + scale).view(x.shape).to(x.dtype)


def _by_frame(x: Tensor, modulation: Tensor) -> Tensor:
    """(B, S, D) as (B, F or 1, tokens, D), to broadcast with a modulation."""
    return x.unflatten(1, (modulation.shape[1], -1))


class _RMSNorm(Function):
    """Keeps x only; autograd would keep three tensors of its size."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return (x * _inverse_rms(x, eps)).mul_(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        x, weight, ctx.eps = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        inverse = _inverse_rms(x, ctx.eps)
        normed = x * inverse
        grad_x = grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).sum_to_size(weight.shape)
        if ctx.needs_input_grad[0]:
            grad_x = grad * weight
            along = torch.linalg.vecdot(grad_x, normed).div_(-x.shape[-1]).unsqueeze(-1)
            grad_x = grad_x.addcmul_(normed, along).mul_(inverse)
        return grad_x, grad_weight, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, weight_tangent: Tensor, _: None) -> Tensor:
        plain = partial(F.rms_norm, eps=ctx.eps)
        return _push_forward(lambda x, weight: plain(x, weight.shape, weight), ctx, (x_tangent, weight_tangent))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)


class _GeluTanh(Function):
    """Keeps its input and its output, which the linear layer behind it keeps anyway: `sigmoid(2a) = output / input`,
    so that the backward pass needs no transcendental function."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        squared = x * x
        return squared.mul_(_GELU_CUBIC).add_(_GELU_LINEAR).mul_(x).sigmoid_().mul_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, output = ctx.saved_tensors
        gate = (output / x).nan_to_num_(nan=0.5)
        slope = (x * x).mul_(3 * _GELU_CUBIC).add_(_GELU_LINEAR)
        return slope.mul_(output).mul_(1 - gate).add_(gate).mul_(grad)

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor) -> Tensor:
        return _push_forward(partial(F.gelu, approximate="tanh"), ctx, (x_tangent,))


class _ModulatedLayerNorm(Function):
    """Keeps x and the modulation; autograd would keep the normalised x too."""

    @staticmethod
    def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        return _modulated_layer_norm(x, shift, scale, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
        x, shift, scale, ctx.eps = inputs
        ctx.save_for_backward(x, shift, scale)
        ctx.save_for_forward(x, shift, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, shift, scale = ctx.saved_tensors
        full, dims = wide(x), x.shape[-1:]
        grad = _by_frame(wide(grad), scale)
        normed, mean, inverse = torch.native_layer_norm(full, dims, None, None, ctx.eps)
        grad_x = grad_shift = grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_shift = grad.sum_to_size(shift.shape)
        if ctx.needs_input_grad[2]:
            grad_scale = _by_frame(normed, scale).mul_(grad).sum_to_size(scale.shape)
        if ctx.needs_input_grad[0]:
            inner = (grad * (1 + scale)).view(x.shape)
            mask = [True, False, False]
            back = torch.ops.aten.native_layer_norm_backward
            grad_x = back(inner, full, dims, mean, inverse, None, None, mask)[0].to(x.dtype)
        return grad_x, grad_shift, grad_scale, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor, shift_tangent: Tensor, scale_tangent: Tensor, _: None) -> Tensor:
        plain = partial(_modulated_layer_norm, eps=ctx.eps)
        return _push_forward(plain, ctx, (x_tangent, shift_tangent, scale_tangent))


def _push_forward(plain: Callable[..., Tensor], ctx: Any, tangents: tuple[Tensor | None, ...]) -> Tensor:
    """The forward-mode derivative of the plain formula at the inputs kept in `ctx`."""
    primals = ctx.saved_tensors
    tangents = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(primals, tangents, strict=True))
    return torch.func.jvp(plain, primals, tangents)[1]
