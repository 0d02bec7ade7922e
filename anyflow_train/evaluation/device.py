"""Where and in which precision a command computes."""

from __future__ import annotations

import torch

from anyflow_train.errors import UserError


def pick_device(name: str, threads: int) -> torch.device:
    """The device of a command's config; `auto` is the GPU if there is one. `threads` 0 leaves torch's choice.

    Raises:
        UserError: a GPU is asked for, and there is none.
    """
    if threads:
        torch.set_num_threads(threads)
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device", "is 'cuda', but torch sees no GPU; use 'auto' or 'cpu'")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The half precision of matrix products; None computes in float32."""
    return torch.bfloat16 if precision == "bf16" else None
