"""Whose kernels a computation is written for: a CPU's or a GPU's.

A dry run computes on fake tensors that say they are on a CPU, because a torch without CUDA cannot make others. It is
to take the branches of a GPU all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_AS_ON_GPU: ContextVar[bool] = ContextVar("as_on_gpu", default=False)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, networks take the branches that they take on a GPU, wherever their tensors are."""
    token = _AS_ON_GPU.set(True)
    try:
        yield
    finally:
        _AS_ON_GPU.reset(token)


def pretends_gpu(x: Tensor) -> bool:
    """Whether a CPU tensor is computed with as if it were on a GPU."""
    return x.device.type == "cpu" and _AS_ON_GPU.get()


def for_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU, and is to be computed with as there."""
    return x.device.type == "cpu" and not _AS_ON_GPU.get()
