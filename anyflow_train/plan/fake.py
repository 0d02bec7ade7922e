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


def call(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """`func(*args, **kwargs)`, without the cache if it is a frequent call on fake tensors of one device."""
    if func is ASKS_DEVICE:  # more than half of all calls
        return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
    if func not in DIRECT or "device" in kwargs:
        return func(*args, **kwargs)
    tensors = [value for value in args if isinstance(value, Tensor)]
    first = tensors[0]
    if any(not isinstance(tensor, FakeTensor) or tensor.fake_device != first.fake_device for tensor in tensors):
        return func(*args, **kwargs)
    with in_kernel_invocation_manager(first.fake_mode):
        out = func(*args, **kwargs)
    return FakeTensor(first.fake_mode, out, first.fake_device)
