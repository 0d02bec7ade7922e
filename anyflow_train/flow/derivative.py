"""Derivatives of the average velocity: along a tangent, `D_w u = du/dt + w . du/dx`, and in the target time, `du/dr`.

A central difference with a finite epsilon is a smoothed derivative. The fastest time features of a trained network turn
by 1 rad per 1/1000 of time, so the smoothed derivative is far from the exact one (see `objectives.diagnose`). Training
with the smoothed one works better.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow_train.flow.path import at_least_float32, expand_time
from anyflow_train.flow.times import TimePrecision, round_time
from anyflow_train.flow.types import Condition, FlowMap

Ends = Literal["clamped", "free"]

SMALLEST_SPAN = 1e-4  # below this a difference of float32 network outputs is noise


@torch.no_grad()
def central_difference(
    flow_map: FlowMap,
    x: Tensor,
    t: Tensor,
    r: Tensor,
    condition: Condition,
    tangent: Tensor,
    epsilon: float,
    ends: Ends,
    precision: TimePrecision = "fp32",
) -> Tensor:
    """Divide the difference of two calls around (x, t) by its span, without gradient. Points and times are float32.

    Args:
        flow_map: the average velocity u(x, t, r, c).
        x: (B, F, C, H, W) points at time t.
        t, r: (B,) or (B, F) in [0, 1], r <= t; r is held fixed.
        condition: of the B samples.
        tangent: direction w in which x moves; shape and dtype of x.
        epsilon: half the span in time; sets how much the derivative is smoothed.
        ends: `clamped` keeps both times in [r, 1] and divides by the true span (second order inside, first order at
            the ends, 0 if the span is below 1e-4); `free` leaves the interval and divides by 2 epsilon, as published.
        precision: `bf16` also rounds the two times to the bfloat16 grid of the published code.

    Returns:
        (B, F, C, H, W) derivative, float32 (float64 for float64 inputs).
    """
    x, t, r, tangent = (at_least_float32(a) for a in (x, t, r, tangent))
    if ends == "free":
        step = epsilon * tangent
        later = flow_map(x + step, round_time(t + epsilon, precision), r, condition)
        earlier = flow_map(x - step, round_time(t - epsilon, precision), r, condition)
        return (later - earlier) / (2 * epsilon)
    after = round_time(t + epsilon, precision).clamp_max(1)
    before = torch.maximum(round_time(t - epsilon, precision), r)
    later = flow_map(x + expand_time(after - t, x) * tangent, after, r, condition)
    earlier = flow_map(x + expand_time(before - t, x) * tangent, before, r, condition)
    span = expand_time(after - before, x)
    smallest = min(SMALLEST_SPAN, epsilon / 2)  # a tiny epsilon in float64 must not give 0
    return torch.where(span < smallest, 0.0, (later - earlier) / span.clamp_min(smallest))


@torch.no_grad()
def target_difference(
    flow_map: FlowMap, x: Tensor, t: Tensor, r: Tensor, condition: Condition, u: Tensor, epsilon: float
) -> Tensor:
    """Compute du/dr from two calls beside u(x, t, r), without gradient.

    Inside it is the central difference. Below `r = epsilon` it is the three-point formula to one side,
    `(-3 u(r) + 4 u(r + e) - u(r + 2 e)) / 2 e`, which is also of second order; a difference that is clamped at 0 would
    be of first order, and half of the samples with r < t have r = 0. Above `t - epsilon` the difference is clamped:
    what it is multiplied by, t - r, is small there.

    Args:
        flow_map: the average velocity u(x, t, r, c).
        x: (B, F, C, H, W) points at time t.
        t, r: (B,) in [0, 1], r <= t; t is held fixed.
        condition: of the B samples.
        u: (B, F, C, H, W) value of the flow map at (x, t, r).
        epsilon: step in time, also e in the formula if r + 2 e <= t.

    Returns:
        (B, F, C, H, W) derivative, float32 (float64 for float64 inputs); 0 if r = t.
    """
    x, t, r, u = (at_least_float32(a) for a in (x, t, r, u))
    low = r < epsilon
    step = torch.where(low, ((t - r) / 2).clamp_max(epsilon), (t - r).clamp_max(epsilon))
    near = flow_map(x, t, r + step, condition)
    other = flow_map(x, t, torch.where(low, r + 2 * step, r - epsilon), condition)
    inside = (near - other) / expand_time(step + epsilon, x)
    smallest = min(SMALLEST_SPAN, epsilon) / 2
    beside = (4 * near - 3 * u - other) / expand_time(2 * step.clamp_min(smallest), x)
    return torch.where(expand_time(step < smallest, x), 0.0, torch.where(expand_time(low, x), beside, inside))


@torch.no_grad()
def exact_target_derivative(flow_map: FlowMap, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    """Compute du/dr exactly, like `exact_derivative`. Arguments and result are those of `target_difference`."""
    x, t, r = (at_least_float32(a) for a in (x, t, r))
    with sdpa_kernel(SDPBackend.MATH):
        derivative = torch.func.jvp(lambda time: flow_map(x, t, time, condition), (r,), (torch.ones_like(r),))[1]
    return derivative.detach()


@torch.no_grad()
def exact_derivative(
    flow_map: FlowMap, x: Tensor, t: Tensor, r: Tensor, condition: Condition, tangent: Tensor
) -> Tensor:
    """Compute the exact derivative by forward-mode differentiation (`torch.func.jvp`), without gradient.

    Attention runs with the math backend, because the fused kernels have no forward-mode formula. The cost is about 1.8
    times that of the central difference. Gradient checkpointing is not supported.

    Args:
        flow_map: the average velocity u(x, t, r, c).
        x: (B, F, C, H, W) points at time t.
        t, r: (B,) or (B, F) in [0, 1], r <= t; r is held fixed.
        condition: of the B samples.
        tangent: direction w in which x moves; shape and dtype of x.

    Returns:
        (B, F, C, H, W) derivative, float32 (float64 for float64 inputs).
    """
    x, t, r, tangent = (at_least_float32(a) for a in (x, t, r, tangent))
    with sdpa_kernel(SDPBackend.MATH):
        derivative = torch.func.jvp(
            lambda point, time: flow_map(point, time, r, condition), (x, t), (tangent, torch.ones_like(t))
        )[1]
    return derivative.detach()
