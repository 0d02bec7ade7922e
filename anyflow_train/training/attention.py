"""Choose the torch kernel that computes softmax attention, and test it on the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow_train.config.run import RunConfig
from anyflow_train.devices import attention_works
from anyflow_train.errors import UserError

KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
# Kernels for inputs that the chosen kernel does not support, fastest first.
OTHERS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
HOPPER = (9, 0)


def choose_kernel(config: RunConfig, device: torch.device) -> str:
    """Choose the kernel: `cudnn`, `flash`, or `sdpa` for torch's own choice.

    A resumed run must use the same kernel, so `auto` does not measure speed. For Wan's shapes cuDNN is the fastest on
    Hopper and later GPUs, and flash on earlier ones.

    Raises:
        UserError: the kernel of `engine.attention` does not run on this device.
    """
    wanted = config.engine.attention
    if wanted == "auto":
        fast = () if device.type != "cuda" else ("flash",)
        if fast and torch.cuda.get_device_capability(device) >= HOPPER:
            fast = ("cudnn", *fast)
        return next((name for name in fast if _problem(config, device, name) is None), "sdpa")
    if wanted != "sdpa" and (problem := _problem(config, device, wanted)):
        raise UserError("engine.attention", f"is {wanted}, which {problem}; use auto")
    return wanted


@contextmanager
def attention_by(name: str) -> Iterator[None]:
    """Compute attention with this kernel inside the block, wherever the kernel supports the inputs."""
    # torch's cache of compiled graphs does not see the kernel: without the tag, a graph of another kernel is reused.
    compiler: Any = torch.compiler.config
    with compiler.patch(cache_key_tag=f"attention {name}"):
        if name == "sdpa":
            yield
            return
        first = KERNELS[name]
        with sdpa_kernel([first, *(kernel for kernel in OTHERS if kernel != first)], set_priority=True):
            yield


def _problem(config: RunConfig, device: torch.device, name: str) -> str | None:
    """Return the problem of a kernel on the device, or None if it works."""
    architecture, half = config.student.architecture, config.engine.precision == "bf16"
    shape = (1, architecture.num_attention_heads, 256, architecture.attention_head_dim)
    if attention_works(KERNELS[name], shape, device, torch.bfloat16 if half else torch.float32):
        return None
    heads = f"heads of {architecture.attention_head_dim} in {config.engine.precision}"
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    return f"does not run on {title} for {heads}"
