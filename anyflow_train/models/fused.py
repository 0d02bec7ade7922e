"""Elementwise operations of a block, with a custom backward pass.

In eager mode, autograd saves and reads an intermediate for each arithmetic step. These operations take a large part of
a small network's time and of a large network's activation memory. Each is therefore a single autograd node, which saves
its input and recomputes the rest. On CUDA it is also a single kernel (`models.fused_gpu`). The plain formulas are used
under `torch.compile`, which fuses them, and under the transforms of `torch.func`, such as the exact time derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from anyflow_train.flow.path import at_least_float32
from anyflow_train.models.fused_gpu import AddGated, ModulatedLayerNorm, RotatedRMSNorm
from anyflow_train.models.kernels import for_cpu, launches_triton, pretends_gpu, transformed
from anyflow_train.models.rotary import rotate

_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR


def rotated_rms_norm(x: Tensor, weight: Tensor, eps: float, heads: int, rotation: Tensor | None) -> Tensor:
    """Compute queries or keys: `rms_norm` over all heads, then `rotary.rotate` if there is a table.

    x: (B, S, D); rotation: (S, head_dim / 2, 2) float32. Returns (B, S, heads, head_dim) in the dtype of x.
    """
    if launches_triton(x):
        return RotatedRMSNorm.apply(x, weight, rotation, eps).unflatten(2, (heads, -1))
    normed = rms_norm(x, weight, eps).unflatten(2, (heads, -1))
    return normed if rotation is None else rotate(normed, rotation)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in float32 inside.

    x: (..., D); weight: (D,). Returns (..., D) in the dtype of x.
    """
    # A dry run uses the function below instead of the GPU kernel: both save x and one number per token.
    if _by_hand(x) or pretends_gpu(x):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute GELU in its tanh approximation, for any shape and dtype.

    It uses `(1 + tanh(a)) / 2 = sigmoid(2a)`: on a CPU, torch's sigmoid takes a third of the time of its tanh.
    """
    return _GeluTanh.apply(x) if _by_hand(x) else F.gelu(x, approximate="tanh")


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute `layer_norm(x) * (1 + scale) + shift` in float32 or wider.

    x: (B, S, D), tokens frame by frame; shift, scale: (B or 1, F or 1, 1, D) float32, one row for all tokens of a
    frame. Returns (B, S, D) in the dtype of x, and x itself. If the residual connection continues from this x, the
    backward pass adds both gradients while it computes that of the norm.
    """
    if launches_triton(x):
        return ModulatedLayerNorm.apply(x, shift, scale, 1.0, eps)
    if transformed():
        normed = F.layer_norm(at_least_float32(x), x.shape[-1:], None, None, eps)
        return torch.addcmul(shift, _by_frame(normed, scale), 1 + scale).view(x.shape).to(x.dtype), x
    return _ModulatedLayerNorm.apply(x, shift, scale, eps)


def wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute a layer norm of x (B, S, D) in float32 or wider, with weight and bias (D,).

    Returns it in the dtype of x, and x itself, as `modulated_layer_norm` does.
    """
    if launches_triton(x):
        return ModulatedLayerNorm.apply(x, bias[None, None, None], weight[None, None, None], 0.0, eps)
    weight, bias = at_least_float32(weight), at_least_float32(bias)
    return F.layer_norm(at_least_float32(x), weight.shape, weight, bias, eps).to(x.dtype), x


def add_gated(x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Compute `x + update * gate` in float32 or wider. Returns the dtype of x.

    x, update: (B, S, D); gate: (B or 1, F or 1, 1, D).
    """
    if launches_triton(x):
        return AddGated.apply(x, update, gate)
    frames = (gate.shape[1], -1)
    # Convert `update` as autocast on CUDA would, so that a CPU saves the same tensor for the gradient of the gate.
    x_wide, update = at_least_float32(x).unflatten(1, frames), at_least_float32(update).unflatten(1, frames)
    return torch.addcmul(x_wide, update, gate).view(x.shape).to(x.dtype)


def _by_hand(x: Tensor) -> bool:
    """Whether to use the functions below. Elsewhere torch's kernels are as fast and save as little."""
    return for_cpu(x) and x.dtype == torch.float32 and not transformed()


def _by_frame(x: Tensor, modulation: Tensor) -> Tensor:
    """Reshape (B, S, D) to (B, F or 1, tokens, D), to broadcast with a modulation."""
    return x.unflatten(1, (modulation.shape[1], -1))


class _RMSNorm(Function):
    """RMS norm that saves x and one number per token; autograd would save three tensors of the size of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        inverse = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        # Same as the layer-norm gradient with zero mean, except for one correction term per token.
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        back = torch.ops.aten.native_layer_norm_backward
        grad_x, grad_weight, _ = back(grad, x, x.shape[-1:], torch.zeros_like(inverse), inverse, weight, None, wanted)
        if grad_x is not None:
            grad_x.add_((grad @ weight).unsqueeze(-1).mul_(inverse).div_(x.shape[-1]))
        return grad_x, grad_weight, None


class _GeluTanh(Function):
    """GELU that saves its input and its output, which the next linear layer saves anyway.

    Because `sigmoid(2a) = output / input`, the backward pass needs no transcendental function.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        output = _polynomial(x, _GELU_CUBIC).mul_(x).sigmoid_().mul_(x)
        ctx.save_for_backward(x, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, output = ctx.saved_tensors
        gate = (output / x).nan_to_num_(nan=0.5)
        bend = _polynomial(x, 3 * _GELU_CUBIC).mul_(output)
        return bend.lerp_(torch.ones_like(gate[:1]), gate).mul_(grad)  # gate + (1 - gate) * bend


def _polynomial(x: Tensor, quadratic: float) -> Tensor:
    """Compute `2 sqrt(2 / pi) + quadratic x^2` in one pass over x."""
    return torch.addcmul(x.new_tensor(_GELU_LINEAR), x, x, value=quadratic)


class _ModulatedLayerNorm(Function):
    """Modulated layer norm that saves x, the modulation and two numbers per token, but not the normalised x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, mean, inverse = _normalise(at_least_float32(x), eps)
        ctx.save_for_backward(x, shift, scale, mean, inverse)
        ctx.set_materialize_grads(False)
        normed = _by_frame(normed, scale)
        return torch.addcmul(shift, normed, 1 + scale, out=normed).view(x.shape).to(x.dtype), x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return residual, None, None, None
        x, shift, scale, mean, inverse = ctx.saved_tensors
        full = at_least_float32(x)
        grad = _by_frame(at_least_float32(grad), scale)
        grad_x = grad_shift = grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_shift = grad.sum_to_size(shift.shape)
        if ctx.needs_input_grad[2]:
            normed = (full - mean).mul_(inverse)
            grad_scale = _by_frame(normed, scale).mul_(grad).sum_to_size(scale.shape)
        if ctx.needs_input_grad[0]:
            inner = (grad * (1 + scale)).view(x.shape)
            back = torch.ops.aten.native_layer_norm_backward
            wanted = [True, False, False]
            grad_x = back(inner, full, x.shape[-1:], mean, inverse, None, None, wanted)[0].to(x.dtype)
            grad_x = grad_x if residual is None else grad_x.add_(residual)
        return grad_x, grad_shift, grad_scale, None


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Apply a layer norm over the last dimension. Returns the result, the mean and the inverse standard deviation."""
    weight = bias = None
    if for_cpu(x):  # on a CPU, only the kernel with a weight is vectorised
        weight, bias = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
    return torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
