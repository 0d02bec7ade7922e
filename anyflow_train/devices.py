"""Devices and precisions of commands."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow_train.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions of the config."""


def pick_device(name: str, threads: int, key: str = "device", local_rank: int | None = None) -> torch.device:
    """Set the number of CPU threads and return the device; `auto` uses a GPU if there is one.

    Args:
        name: auto, cpu or cuda.
        threads: number of threads; 0 lets torch choose.
        key: config key of `name`, for errors.
        local_rank: index of this process on its node, and of its GPU; None uses torch's current GPU.

    Raises:
        UserError: there is no GPU, or no GPU with that index.
    """
    if threads:
        torch.set_num_threads(threads)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(key, "'cuda', but torch finds no GPU; use 'auto' or 'cpu'")
    if local_rank is None:
        return torch.device("cuda")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise UserError("LOCAL_RANK", f"{local_rank}, but this node has {count} GPUs; start one process per GPU")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def autocast_dtype(precision: str) -> torch.dtype | None:
    """Return the dtype of matrix products with float32 weights; None for float32 products."""
    return None if precision == "fp32" else DTYPES[precision]


def attention_works(kernel: SDPBackend, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> bool:
    """Try a kernel of attention, forward and backward, on heads (1, H, S, head_dim). Returns whether it works."""
    query, key, value = (torch.zeros(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        with sdpa_kernel(kernel):
            F.scaled_dot_product_attention(query, key, value).sum().backward()
    except RuntimeError:
        return False
    return True
