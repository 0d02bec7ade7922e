"""Text dropout, and guidance fused into training: the regression target of the student, and its tangent.

Let w be the CFG scale, v the velocity given the text, and u_neg the student's prediction for the negative prompt.
Each choice regresses u to `v_g - (t - r) D u`, where `v_g = u_neg + w (v - u_neg)` and D is the total derivative along
a tangent. The loss is divided by w^2.

* `none`: w = 1, so v_g = v; the tangent is v.
* `prediction`: the published loss, `|| (u - (1 - w) sg[u_neg]) / w - (v - (t - r) D / w) ||^2`. Multiplied out:
  u_neg is taken at (x, t, r), the tangent is v, and text-dropped samples have the same w. The result is not the flow
  map of the guided ODE.
* `target`: u_neg is taken at (x, t, t), the tangent is v_g, and w = 1 on text-dropped samples. The result is the flow
  map of the guided ODE.

Text-dropped samples need no call for u_neg: `target` does not use it, and in `prediction` it is u itself, detached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.path import at_least_float32, expand_time, interpolate, path_velocity
from anyflow_train.flow.types import Condition, FlowMap, take
from anyflow_train.objectives.types import Roles

Guidance = Literal["none", "prediction", "target"]
Velocity = Literal["data", "teacher"]


@dataclass(frozen=True)
class Noised:
    """A batch of points on the path from data to noise, or on the student's own (see `objectives.source`).

    Attributes:
        x: (B, F, C, H, W) points x_t, float32 or float64.
        velocity: (B, F, C, H, W) `z - x0`, dtype of x; NaN if there are no data.
        t, r: (B,) times, in the dtype of x.
        condition: the text; that of text-dropped samples is replaced by the negative prompt.
        negative: the negative prompt for all B samples.
        dropped: for each sample, whether its text was dropped.
    """

    x: Tensor
    velocity: Tensor
    t: Tensor
    r: Tensor
    condition: Condition
    negative: Condition
    dropped: tuple[bool, ...]

    def __getitem__(self, rows: Sequence[int]) -> Noised:
        """Select samples."""
        x, velocity, t, r = (take(values, rows) for values in (self.x, self.velocity, self.t, self.r))
        dropped = tuple(self.dropped[row] for row in rows)
        return Noised(x, velocity, t, r, self.condition[rows], self.negative[rows], dropped)


@dataclass(frozen=True)
class Regression:
    """The regression target at r = t, from which the objective subtracts `(t - r) D u`.

    Attributes:
        velocity: (B, F, C, H, W) v_g, without gradient.
        tangent: (B, F, C, H, W) direction of the total derivative.
        divisor: (B,) w^2, by which the loss is divided.
        own: (B,) weight of the student's own (detached) prediction in v_g; None if it is not used.
    """

    velocity: Tensor
    tangent: Tensor
    divisor: Tensor
    own: Tensor | None = None

    def error(self, u: Tensor, goal: Tensor) -> Tensor:
        """Compute the losses (B,) of predictions u against the goal derived from `velocity`, both (B, F, C, H, W)."""
        if self.own is not None:
            goal = goal + expand_time(self.own, u) * u.detach()
        return square_error(u, goal, self.divisor)


def noised(batch: Batch, draw: Draw, t: Tensor, r: Tensor, text_dropout: float) -> Noised:
    """Draw the noise and the dropped texts of a batch, without waiting for the device.

    Args:
        batch: B samples.
        draw: random numbers of the same positions.
        t, r: (B,) times.
        text_dropout: probability that a text is replaced by the negative prompt.

    Raises:
        ValueError: batch and random numbers have different positions.
    """
    if batch.positions != draw.positions:
        raise ValueError(f"the batch has the positions {batch.positions}, but the random numbers {draw.positions}")
    x0 = at_least_float32(batch.latents)
    z = draw.normal("noise", tuple(x0.shape[1:])).to(x0.dtype)
    t, r = t.to(x0.dtype), r.to(x0.dtype)
    return Noised(interpolate(x0, z, t), path_velocity(x0, z), t, r, *drop_texts(batch, draw, text_dropout))


def drop_texts(batch: Batch, draw: Draw, text_dropout: float) -> tuple[Condition, Condition, tuple[bool, ...]]:
    """Return the condition, that of the negative prompt, and for each sample whether its text was dropped."""
    dropped = tuple(chance < text_dropout for chance in draw.chances("text dropout"))
    texts = zip(dropped, batch.condition.text, strict=True)
    text = torch.stack([batch.negative.text[0] if gone else given for gone, given in texts])
    return batch.condition.with_text(text), batch.condition.with_text(batch.negative.text), dropped


@torch.no_grad()
def regression(roles: Roles, noised: Noised, guidance: Guidance, scale: float, velocity: Velocity) -> Regression:
    """Compute the regression target for a choice of guidance and velocity (see the top of this file).

    With the teacher's velocity, `target` takes u_neg from the teacher too, so the student learns the ODE of the guided
    teacher.

    Args:
        roles: flow maps of the run.
        noised: the batch.
        guidance: kind of guidance.
        scale: CFG scale w.
        velocity: `data` takes v from the batch, `teacher` from the teacher.

    Raises:
        ValueError: the teacher's velocity is chosen, but the roles lack a teacher.
    """
    if velocity == "teacher" and roles.teacher is None:
        raise ValueError("velocity 'teacher' needs a teacher among the roles")
    teacher = roles.teacher if velocity == "teacher" else None
    v = noised.velocity if teacher is None else teacher(noised.x, noised.t, noised.t, noised.condition)
    if guidance == "none":
        return Regression(v, v, torch.ones_like(noised.t))
    if guidance == "prediction":
        guided = torch.lerp(_unconditional(roles.student, noised, noised.r), v, scale)
        own = _by_sample(noised, 1 - scale, 0.0) if any(noised.dropped) else None
        return Regression(guided, v, torch.full_like(noised.t, scale**2), own)
    row_scale = _by_sample(noised, 1.0, scale)
    guided = torch.lerp(_unconditional(teacher or roles.student, noised, noised.t), v, expand_time(row_scale, v))
    return Regression(guided, guided, row_scale.square())


def _unconditional(flow_map: FlowMap, noised: Noised, r: Tensor) -> Tensor:
    """Predict the velocity for the negative prompt, like `x`; 0 on text-dropped samples, which do not use it.

    The network is called with at least one sample: under ZeRO-3 a process with fewer calls would hang the others.
    """
    if not any(noised.dropped):
        return flow_map(noised.x, noised.t, r, noised.negative)
    kept = [row for row, gone in enumerate(noised.dropped) if not gone] or [0]
    found = flow_map(take(noised.x, kept), take(noised.t, kept), take(r, kept), noised.negative[kept])
    rows = dict(zip(kept, found, strict=True))
    nothing = torch.zeros_like(found[0])
    return torch.stack([nothing if gone else rows[row] for row, gone in enumerate(noised.dropped)])


def divisor(noised: Noised, guidance: Guidance, scale: float) -> Tensor:
    """Compute the divisor (B,) of the loss for `none` and `target`: the square of the scale of each sample."""
    return torch.ones_like(noised.t) if guidance == "none" else _by_sample(noised, 1.0, scale).square()


def _by_sample(noised: Noised, dropped: float, kept: float) -> Tensor:
    """Build (B,) numbers: `dropped` for text-dropped samples, `kept` for the others."""
    return torch.stack([torch.full_like(noised.t[0], dropped if gone else kept) for gone in noised.dropped])


def square_error(u: Tensor, goal: Tensor, divisor: Tensor) -> Tensor:
    """Compute (B,) means of `(u - goal)^2` over the elements of each sample, divided by `divisor` (B,)."""
    return (u - goal).square().flatten(1).mean(dim=1) / divisor
