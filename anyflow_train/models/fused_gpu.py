"""Elementwise operations of a block in eager mode on CUDA, each of them one launch forward and one backward.

Gradients of what is broadcast over tokens take one more launch, a sum of partial sums. A dry run allocates the results
and launches nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from anyflow_train.models.kernels import pretends_gpu

# Rows that one program of a backward kernel adds up.
_ROWS = 32
_WARPS = 8


class ModulatedLayerNorm(Function):
    """`layer_norm(x) * (plus + scale) + shift`, and x for the residual connection.

    Saves x, the modulation and two numbers per token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, plus: float, eps: float) -> tuple[Tensor, Tensor]:
        """x: (B, S, D); shift, scale: (B or 1, F or 1, 1, D), of equal strides."""
        same, x = x, x.contiguous()
        out = torch.empty_like(x)
        mean, inverse = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
        tokens = x.shape[1]
        frame, width = tokens // scale.shape[1], x.shape[-1]
        arguments = (x, shift, scale, out, mean, inverse, tokens, frame, *_strides(scale), width, plus, eps)
        _launch("layer_norm", (mean.numel(),), *arguments, BLOCK=_block(width))
        ctx.save_for_backward(x, shift, scale, mean, inverse)
        ctx.plus = plus
        ctx.set_materialize_grads(False)
        return out, same

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, residual: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return residual, None, None, None, None
        x, shift, scale, mean, inverse = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        added = grad if residual is None else residual.contiguous()
        summed = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        grid, sums, place = _partial(x, scale, 2, summed)
        arguments = (grad, added, x, scale, mean, inverse, grad_x, sums, grid[0], *place, ctx.plus)
        options = {"ROWS": _ROWS, "RESIDUAL": residual is not None, "SUMS": summed, "BLOCK": _block(x.shape[-1])}
        _launch("layer_norm_backward", grid, *arguments, **options)
        if not summed:
            return grad_x, None, None, None, None
        of_shift, of_scale = _added(sums, scale)
        return grad_x, of_shift.to(shift.dtype), of_scale.to(scale.dtype), None, None


class AddGated(Function):
    """`x + update * gate`. Saves the update and the gate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        """x, update: (B, S, D); gate: (B or 1, F or 1, 1, D)."""
        x, update = x.contiguous(), update.contiguous()
        out, tokens, width = torch.empty_like(x), x.shape[1], x.shape[-1]
        arguments = (x, update, gate, out, tokens, tokens // gate.shape[1], *_strides(gate), width)
        _launch("add_gated", (x.shape[0] * tokens,), *arguments, BLOCK=_block(width))
        ctx.save_for_backward(update, gate)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        update, gate = ctx.saved_tensors
        rows, grad_update, summed = grad.contiguous(), torch.empty_like(update), ctx.needs_input_grad[2]
        grid, sums, place = _partial(update, gate, 1, summed)
        arguments = (rows, update, gate, grad_update, sums, *place)
        _launch("add_gated_backward", grid, *arguments, ROWS=_ROWS, SUMS=summed, BLOCK=_block(update.shape[-1]))
        return grad, grad_update, _added(sums, gate)[0].to(gate.dtype) if summed else None


class RotatedRMSNorm(Function):
    """RMS norm over all channels, then a rotation of adjacent ones if there is a table. Saves one number per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rotation: Tensor | None, eps: float) -> Tensor:
        """x: (B, S, D), D even; weight: (D,); rotation: (S, head_dim / 2, 2) float32."""
        x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        width, turned = x.shape[-1], rotation is not None
        pairs = 1 if rotation is None else rotation.shape[1]
        arguments = (x, weight, rotation if turned else x, out, inverse, x.shape[-2], width, pairs, eps)
        _launch("rms_norm", (inverse.numel(),), *arguments, ROTATE=turned, HALF=_block(width) // 2)
        ctx.save_for_backward(x, weight, rotation, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rotation, inverse = ctx.saved_tensors
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        width, turned, summed, rows = x.shape[-1], rotation is not None, ctx.needs_input_grad[1], inverse.numel()
        parts, pairs = -(-rows // _ROWS), 1 if rotation is None else rotation.shape[1]
        sums = torch.empty((parts, width) if summed else (1, 1), dtype=torch.float32, device=x.device)
        arguments = (grad, x, weight, rotation if turned else x, inverse, grad_x, sums, rows, x.shape[-2], width, pairs)
        options = {"ROWS": _ROWS, "ROTATE": turned, "SUMS": summed, "HALF": _block(width) // 2}
        _launch("rms_norm_backward", (parts,), *arguments, **options)
        return grad_x, sums.sum(0).to(weight.dtype) if summed else None, None, None


def _launch(name: str, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    if pretends_gpu(arguments[0]):
        return
    from anyflow_train.models import triton_kernels  # imported where it runs: builds for CPUs have no Triton

    getattr(triton_kernels, name)[grid](*arguments, **options, num_warps=_WARPS)


def _block(width: int) -> int:
    """Number of columns that a program computes: a power of two."""
    return 1 << max(width - 1, 1).bit_length()


def _strides(modulation: Tensor) -> tuple[int, int]:
    """Steps in memory from a sample to the next one and from a frame to the next one; 0 where there is only one."""
    samples, frames = (modulation.stride(axis) if modulation.shape[axis] > 1 else 0 for axis in (0, 1))
    return samples, frames


def _partial(
    x: Tensor, modulation: Tensor, kinds: int, wanted: bool
) -> tuple[tuple[int, int], Tensor, tuple[int, ...]]:
    """Return the grid of a backward kernel, a place for its partial sums, and its arguments on the modulation.

    Sums are (kinds, B, F, parts, D) float32.
    """
    frames, width = modulation.shape[1], x.shape[-1]
    per_frame = x.shape[1] // frames
    parts = -(-per_frame // _ROWS)
    shape = (kinds, x.shape[0], frames, parts, width) if wanted else (1,) * 5
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    return (x.shape[0] * frames, parts), sums, (frames, per_frame, *_strides(modulation), width)


def _added(sums: Tensor, modulation: Tensor) -> Tensor:
    """Add up partial sums (kinds, B, F, parts, D) to gradients (kinds, *shape of the modulation)."""
    axes = (3,) if modulation.shape[0] == sums.shape[1] else (1, 3)
    return sums.sum(axes, keepdim=True)
