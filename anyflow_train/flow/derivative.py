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
    return _quotient(later - earlier, after - before, epsilon)


def _quotient(change: Tensor, span: Tensor, epsilon: float) -> Tensor:
    smallest = min(SMALLEST_SPAN, epsilon / 2)  # a tiny epsilon in float64 must not give 0
    span = expand_time(span, change)
    return torch.where(span < smallest, 0.0, change / span.clamp_min(smallest))


@torch.no_grad()
def target_secant(
    flow_map: FlowMap, x: Tensor, t: Tensor, r: Tensor, condition: Condition, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Compute u and du/dr at r from two calls around r, without gradient.

    The derivative is the difference of the calls divided by its span, and u lies on the line between them. Both times
    stay in [0, t]: u is exact at the ends, where one of the calls is at r, and of second order inside; the derivative
    is of second order inside and of first order at the ends. A formula of three points to one side, of second order at
    r = 0, was tried and not kept: it amplifies noise of the network, and its training diverged without full
    rebalancing (docs/objectives.md).

    Args:
        flow_map: the average velocity u(x, t, r, c).
        x: (B, F, C, H, W) points at time t.
        t, r: (B,) in [0, 1], r <= t; t is held fixed.
        condition: of the B samples.
        epsilon: half the span in time.

    Returns:
        u and du/dr, both (B, F, C, H, W) float32 (float64 for float64 inputs); du/dr is 0 if the span is below 1e-4.
    """
    x, t, r = (at_least_float32(a) for a in (x, t, r))
    after, before = torch.minimum(r + epsilon, t), (r - epsilon).clamp_min(0)
    later, earlier = flow_map(x, t, after, condition), flow_map(x, t, before, condition)
    slope = _quotient(later - earlier, after - before, epsilon)
    return earlier + expand_time(r - before, x) * slope, slope


@torch.no_grad()
def exact_target_derivative(
    flow_map: FlowMap, x: Tensor, t: Tensor, r: Tensor, condition: Condition
) -> tuple[Tensor, Tensor]:
    """Compute u and du/dr exactly, like `exact_derivative`. Arguments and result are those of `target_secant`."""
    x, t, r = (at_least_float32(a) for a in (x, t, r))
    with sdpa_kernel(SDPBackend.MATH):
        found = torch.func.jvp(lambda time: flow_map(x, t, time, condition), (r,), (torch.ones_like(r),))
    return found[0].detach(), found[1].detach()


@torch.no_grad()
def exact_derivative(
    flow_map: FlowMap, x: Tensor, t: Tensor, r: Tensor, condition: Condition, tangent: Tensor
) -> Tensor:
    """Compute the exact derivative by forward-mode differentiation (`torch.func.jvp`), without gradient.

    Attention runs with the math backend, because the fused kernels have no forward-mode formula. The cost is about 1.8
    times that of the central difference. Compiled networks are not supported.

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
