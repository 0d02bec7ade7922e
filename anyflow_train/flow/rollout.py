"""Flow-map backward simulation: a sampler with N steps, stopped around step g, in at most three network calls."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from anyflow_train.flow.sampler import jump
from anyflow_train.flow.times import sampling_grid
from anyflow_train.flow.types import Condition, FlowMap

FirstJump = Literal["gradient", "detached"]


def rollout_jumps(steps: int, index: int, shift: float) -> tuple[tuple[float, float], ...]:
    """The jumps 1 -> tau_g -> tau_{g+1} -> 0 on the grid of N steps without the empty ones: 2 or 3 (1 for N = 1)."""
    if not 0 <= index < steps:
        raise ValueError(f"a rollout of {steps} steps has no step {index}")
    grid = sampling_grid(steps, shift)
    stops = (grid[0], grid[index], grid[index + 1], grid[-1])
    return tuple((t, r) for t, r in pairwise(stops) if t > r)


def rollout(
    flow_map: FlowMap,
    z: Tensor,
    condition: Condition,
    steps: int,
    index: int,
    shift: float,
    first_jump: FirstJump = "gradient",
) -> Tensor:
    """From noise z (B, F, C, H, W) to latents of the same shape.

    Args:
        first_jump: gradient flows through every jump, or not through 1 -> tau_g, where there is one.
    """
    x = z
    jumps = rollout_jumps(steps, index, shift)
    for number, (t, r) in enumerate(jumps):
        fixed = first_jump == "detached" and number == 0 and index > 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and not fixed):
            x = jump(flow_map, x, t, r, condition)
    return x
