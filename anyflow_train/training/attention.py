"""Which of torch's kernels computes softmax attention in a run: chosen, tried on the device, and said."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# For what the chosen kernel cannot do, in the order of their speed.
OTHERS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
HOPPER = (9, 0)


def choose_kernel(config: RunConfig, device: torch.device) -> str:
    """The kernel's name: `cudnn`, `flash`, or `sdpa` for torch's own choice.

    `auto` is not measured at the start: a run that goes on must not change its kernel with the machine's mood. On
    Hopper and later cuDNN's is the fastest for Wan's shapes, before them flash.

    Raises:
        UserError: the one that is asked for does not run here.
    """
    wanted = config.engine.attention
    if wanted == "sdpa":
        return wanted
    if wanted != "auto":
        problem = _problem(config, device, wanted)
        if problem:
            raise UserError("engine.attention", f"is {wanted}, which {problem}; use auto")
        return wanted
    if device.type != "cuda":
        return "sdpa"
    order = ("cudnn", "flash") if torch.cuda.get_device_capability(device) >= HOPPER else ("flash",)
    return next((name for name in order if _problem(config, device, name) is None), "sdpa")


@contextmanager
def attention_by(name: str) -> Iterator[None]:
    """Inside, attention is computed by this kernel wherever it can be."""
    if name == "sdpa":
        yield
        return
    first = KERNELS[name]
    with sdpa_kernel([first, *(kernel for kernel in OTHERS if kernel != first)], set_priority=True):
        yield


def _problem(config: RunConfig, device: torch.device, name: str) -> str | None:
    """Why a kernel does not run here, forward and backward; None if it does."""
    architecture, half = config.student.architecture, config.engine.precision == "bf16"
    shape = (1, architecture.num_attention_heads, 256, architecture.attention_head_dim)
    dtype = torch.bfloat16 if half else torch.float32
    query, key, value = (torch.zeros(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        with sdpa_kernel(KERNELS[name]):
            F.scaled_dot_product_attention(query, key, value).sum().backward()
    except RuntimeError:
        heads = f"heads of {architecture.attention_head_dim} in {config.engine.precision}"
        return f"does not run on {_title(device)} for {heads}"
    return None


def _title(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
