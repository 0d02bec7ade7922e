"""Faster calls on fake tensors: torch asks a cache about every call, which takes longer than the call itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

ATEN = torch.ops.aten
ASKS_DEVICE = torch.ops.prim.device.default
# Frequent calls of one tensor, or of two on one device, whose meta kernel is in C++: those in Python are slower.
DIRECT = frozenset(
    {
        ATEN._to_copy.default,
        ATEN._unsafe_view.default,
        ATEN.clone.default,
        ATEN.detach.default,
        ATEN.expand.default,
        ATEN.mm.default,
        ATEN.permute.default,
        ATEN.select.int,
        ATEN.slice.Tensor,
        ATEN.sum.dim_IntList,
        ATEN.t.default,
        ATEN.transpose.int,
        ATEN.unsqueeze.default,
        ATEN.view.default,
    }
)
# The result looks like the largest operand, if all operands have its dtype and it has the shape of the result. The meta
# kernels of these calls are in Python.
ELEMENTWISE = frozenset(
    {
        ATEN.add.Tensor,
        ATEN.cos.default,
        ATEN.div.Tensor,
        ATEN.gelu.default,
        ATEN.gelu_backward.default,
        ATEN.mul.Tensor,
        ATEN.silu.default,
        ATEN.silu_backward.default,
        ATEN.sin.default,
        ATEN.sub.Tensor,
    }
)


def call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, without the cache if it is a frequent call on fake tensors of one device."""
    if func is ASKS_DEVICE:  # more than half of all calls
        return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
    tensors = [value for value in args if isinstance(value, Tensor)]
    direct, given = func, args
    if func is ATEN.addmm.default and args[0].ndim == 1:
        direct, given = ATEN.mm.default, args[1:]  # a linear layer with a bias
    elif func in ELEMENTWISE and (largest := _looks_like(tensors)) is not None:
        direct, given = ATEN.clone.default, (largest,)
    first = tensors[0] if tensors and direct in DIRECT and "device" not in kwargs else None
    if not isinstance(first, FakeTensor) or any(
        not isinstance(tensor, FakeTensor) or tensor.fake_device != first.fake_device for tensor in tensors
    ):
        return func(*args, **kwargs)
    with in_kernel_invocation_manager(first.fake_mode):
        out = direct(*given, **({} if direct is not func else kwargs))
    return FakeTensor(first.fake_mode, out, first.fake_device)


def _looks_like(tensors: Sequence[Tensor]) -> Tensor | None:
    """Find the operand that the result of an elementwise call looks like; None if that is not certain."""
    largest = max(tensors, key=Tensor.numel)
    shape = largest.shape
    for tensor in tensors:
        # Shapes are compared from the last dimension on, as in broadcasting.
        sizes = zip(reversed(tensor.shape), reversed(shape), strict=False)
        fits = tensor.ndim <= len(shape) and all(size in (1, whole) for size, whole in sizes)
        if not fits or tensor.dtype != largest.dtype or not largest.is_floating_point():
            return None
    return largest
