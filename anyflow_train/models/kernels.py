"""Choose between code branches for CPU kernels and GPU kernels.

A dry run computes on fake tensors on a CPU, because torch without CUDA cannot create others. It must nevertheless take
the branches of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.util import find_spec

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


def launches_triton(x: Tensor) -> bool:
    """Whether the fused kernels compute with x: in eager mode on CUDA where Triton is installed, and in a dry run."""
    wanted = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and not transformed()
    return wanted and (_has_triton() if x.is_cuda else pretends_gpu(x))


def transformed() -> bool:
    """Whether torch.compile or a transform of torch.func runs this code, instead of eager mode."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _dry() -> bool:
    # torch.compile cannot read a context variable; a dry run does not compile.
    return not torch.compiler.is_compiling() and _AS_ON_GPU.get()
