"""Whose kernels a computation is written for: a CPU's or a GPU's.

A dry run computes on fake tensors that say they are on a CPU, because a torch without CUDA cannot make others. It is
to take the branches of a GPU all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
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
    """Whether a CPU tensor takes the branches of a GPU."""
    return x.device.type == "cpu" and _dry()


def for_cpu(x: Tensor) -> bool:
    """Whether a tensor is on a CPU and takes the branches of a CPU."""
    return x.device.type == "cpu" and not _dry()


def _dry() -> bool:
    # torch.compile cannot read a context variable, and a dry run compiles nothing.
    return not torch.compiler.is_compiling() and _AS_ON_GPU.get()
