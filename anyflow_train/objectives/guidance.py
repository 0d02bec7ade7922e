"""Text dropping, and guidance fused into training: what the student is regressed to, and along which tangent.

With w the CFG scale, v the velocity given the text and u_neg the student's own prediction for the negative prompt,
every choice regresses u to `v_g - (t - r) D u` along some tangent, with `v_g = u_neg + w (v - u_neg)`, and divides the
loss by w^2:

* `none`: w = 1, so v_g = v.
* `prediction`, as published, is written `|| (u - (1 - w) sg[u_neg]) / w - (v - (t - r) D / w) ||^2`; multiplied out
  that is u against v_g with u_neg taken at (x, t, r), tangent v, and the same w on text-dropped samples. Not the map of
  the guided flow.
* `target`: u_neg at (x, t, t), tangent v_g, w = 1 on text-dropped samples: the flow map of the guided ODE.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.path import at_least_float32, interpolate, path_velocity
from anyflow_train.flow.types import Condition
from anyflow_train.objectives.types import Roles

Guidance = Literal["none", "prediction", "target"]
Velocity = Literal["data", "teacher"]


@dataclass(frozen=True)
class Noised:
    """A batch on its way from data to noise.

    Attributes:
        x: (B, F, C, H, W) points x_t, float32 or float64.
        velocity: `z - x0`, like x.
        t, r: (B,) times, in the dtype of x.
        condition: the text, with some samples' replaced by the negative prompt.
        negative: the negative prompt for all B samples.
        dropped: (B,) bool, whether a sample's text is the negative prompt.
    """

    x: Tensor
    velocity: Tensor
    t: Tensor
    r: Tensor
    condition: Condition
    negative: Condition
    dropped: Tensor


@dataclass(frozen=True)
class Regression:
    """What the student learns at r = t, before the time derivative is taken off.

    Attributes:
        velocity: (B, F, C, H, W), no gradient: v_g.
        tangent: direction of the total derivative, like velocity.
        divisor: (B,) w^2, by which the loss is divided.
    """

    velocity: Tensor
    tangent: Tensor
    divisor: Tensor


def noised(batch: Batch, draw: Draw, t: Tensor, r: Tensor, text_dropout: float) -> Noised:
    """Draw the noise and the dropped texts of a batch; nothing here waits for the device."""
    if batch.slots != draw.slots:
        raise ValueError(f"the batch holds slots {batch.slots}, the random numbers are for {draw.slots}")
    x0 = at_least_float32(batch.latents)
    z = draw.normal("noise", tuple(x0.shape[1:])).to(x0.dtype)
    t, r = t.to(x0.dtype), r.to(x0.dtype)
    dropped = draw.uniform("text dropout", 1).squeeze(1) < text_dropout
    text = torch.where(dropped[:, None, None], batch.negative.text, batch.condition.text)
    negative = batch.condition.with_text(batch.negative.text)
    return Noised(interpolate(x0, z, t), path_velocity(x0, z), t, r, batch.condition.with_text(text), negative, dropped)


@torch.no_grad()
def regression(roles: Roles, noised: Noised, guidance: Guidance, scale: float, velocity: Velocity) -> Regression:
    """The regression that a choice of guidance and of velocity stands for.

    With the teacher's velocity, `target` takes v_g from the teacher alone, that is, the guided teacher's ODE.
    Raises ValueError where the run has no teacher to take it from.
    """
    if velocity == "teacher" and roles.teacher is None:
        raise ValueError("velocity 'teacher' needs a teacher among the roles")
    teacher = roles.teacher if velocity == "teacher" else None
    v = noised.velocity if teacher is None else teacher(noised.x, noised.t, noised.t, noised.condition)
    if guidance == "none":
        return Regression(v, v, torch.ones_like(noised.t))
    if guidance == "prediction":
        unconditional = roles.student(noised.x, noised.t, noised.r, noised.negative)
        return Regression(torch.lerp(unconditional, v, scale), v, torch.full_like(noised.t, scale**2))
    unconditional = (teacher or roles.student)(noised.x, noised.t, noised.t, noised.negative)
    row_scale = torch.where(noised.dropped, 1.0, scale).to(v.dtype)
    guided = torch.lerp(unconditional, v, row_scale.reshape(-1, *[1] * (v.ndim - 1)))
    return Regression(guided, guided, row_scale.square())


def square_error(u: Tensor, goal: Tensor, divisor: Tensor) -> Tensor:
    """(B,) mean over a sample's elements of `(u - goal)^2`, divided by `divisor` (B,)."""
    return (u - goal).square().flatten(1).mean(dim=1) / divisor
