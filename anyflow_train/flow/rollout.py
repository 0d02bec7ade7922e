"""Flow-map backward simulation (AnyFlow, arXiv 2605.13724, on-policy stage).

A rollout follows step g of a sampler with N steps, in at most three network calls.
"""

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
    """Jumps 1 -> tau_g -> tau_{g+1} -> 0 on the grid of N steps, without empty ones: 2 or 3 jumps (1 for N = 1).

    Args:
        steps: N.
        index: g, in 0..N-1.
        shift: time shift of the grid.

    Returns:
        (t, r) of each jump.

    Raises:
        ValueError: the index is not in 0..N-1.
    """
    if not 0 <= index < steps:
        raise ValueError(f"a rollout of {steps} steps has the steps 0 to {steps - 1}, not {index}")
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
    """Roll the student out from noise z (B, F, C, H, W) to latents of the same shape.

    Args:
        flow_map: the student.
        z: (B, F, C, H, W) noise.
        condition: of the B samples.
        steps: N.
        index: g, in 0..N-1.
        shift: time shift of the grid.
        first_jump: `gradient` lets the gradient flow through every jump; `detached` excludes the jump 1 -> tau_g.

    Returns:
        (B, F, C, H, W) in the dtype of z.

    Raises:
        ValueError: the index is not in 0..N-1.
    """
    x = z
    jumps = rollout_jumps(steps, index, shift)
    for number, (t, r) in enumerate(jumps):
        fixed = first_jump == "detached" and number == 0 and index > 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and not fixed):
            x = jump(flow_map, x, t, r, condition)
    return x
