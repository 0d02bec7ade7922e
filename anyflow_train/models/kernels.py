"""Choose between code branches for CPU kernels and GPU kernels.

A dry run computes on fake tensors on a CPU, because torch without CUDA cannot create others. It must nevertheless take
the branches of a GPU.
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
    """Make networks take the branches of a GPU within the context, on every device."""
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
    # torch.compile cannot read a context variable; a dry run does not compile.
    return not torch.compiler.is_compiling() and _AS_ON_GPU.get()
