"""Times in [0, 1]; 1 is noise, 0 is data. They are float32, except if the published bfloat16 rounding is chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from anyflow_train.config.positions import Branch, BranchCounts
from anyflow_train.flow.draw import Draw

TimePrecision = Literal["fp32", "bf16"]
TimeDistribution = Literal["uniform", "logit_normal"]
Time = TypeVar("Time", float, Tensor)

TIME_SCALE = 1000.0  # networks and the published code take times in 0..1000; its bfloat16 grid is defined there


@dataclass(frozen=True)
class Interval:
    """Source and target times of the flow map.

    Attributes:
        t: (B,) source time, float32 in [0, 1].
        r: (B,) target time, `r <= t`.
        branch: (B,) int64, `Branch`.
    """

    t: Tensor
    r: Tensor
    branch: Tensor


def shift_time(t: Time, shift: float) -> Time:
    """Shift a time, `s t / (1 + (s - 1) t)`. A larger s moves more steps towards noise; s = 1 changes nothing."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_grid(steps: int, shift: float) -> tuple[float, ...]:
    """The `steps + 1` times of a sampler, from 1 to 0. They are evenly spaced before the shift.

    Raises:
        ValueError: fewer than 1 step.
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least 1 step, not {steps}")
    return tuple(shift_time((steps - index) / steps, shift) for index in range(steps + 1))


def round_time(t: Tensor, precision: TimePrecision) -> Tensor:
    """Round times as the published code does: `bf16` gives a grid of 4/1000 above 0.512; `fp32` changes nothing."""
    if precision == "fp32":
        return t
    return (t * TIME_SCALE).to(torch.bfloat16).to(t.dtype) / TIME_SCALE


def draw_interval(draw: Draw, counts: BranchCounts, shift: float, precision: TimePrecision) -> Interval:
    """Draw the times of the flow-map objective.

    Two uniform numbers are drawn per sample. The larger is t. On the diffusion branch r is t, on the consistency branch
    0, on the free branch the smaller number. Both times are then shifted and rounded.

    Args:
        draw: random numbers of B samples.
        counts: branches of the global batch.
        shift: time shift.
        precision: `bf16` rounds the times as the published code does.
    """
    # Pageable host memory is staged before the call returns, so this copy does not wait for the device.
    branch = torch.tensor([counts.branch(position) for position in draw.positions]).to(draw.device, non_blocking=True)
    pair = draw.uniform("interval", 2)
    t, smaller = pair.amax(dim=1), pair.amin(dim=1)
    r = torch.where(branch == Branch.DIFFUSION, t, smaller)
    r = torch.where(branch == Branch.CONSISTENCY, torch.zeros_like(r), r)
    return Interval(round_time(shift_time(t, shift), precision), round_time(shift_time(r, shift), precision), branch)


def draw_diffusion_time(draw: Draw, distribution: TimeDistribution, shift: float, precision: TimePrecision) -> Tensor:
    """Draw times for flow matching, (B,) float32: uniform or logit-normal(0, 1), then shifted and rounded."""
    if distribution == "uniform":
        t = draw.uniform("diffusion time", 1).squeeze(1)
    else:
        t = draw.normal("diffusion time", ()).sigmoid()
    return round_time(shift_time(t, shift), precision)
