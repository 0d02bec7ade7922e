"""Text dropping, and guidance fused into training: what the student is regressed to, and along which tangent.

With w the CFG scale, v the velocity given the text and u_neg the student's own prediction for the negative prompt,
every choice regresses u to `v_g - (t - r) D u` along some tangent, with `v_g = u_neg + w (v - u_neg)`, and divides the
loss by w^2:

* `none`: w = 1, so v_g = v.
* `prediction`, as published, is written `|| (u - (1 - w) sg[u_neg]) / w - (v - (t - r) D / w) ||^2`; multiplied out
  that is u against v_g with u_neg taken at (x, t, r), tangent v, and the same w on text-dropped samples. Not the map of
  the guided flow.
* `target`: u_neg at (x, t, t), tangent v_g, w = 1 on text-dropped samples: the flow map of the guided ODE.

On text-dropped samples u_neg is not asked for: `target` does not need it, and `prediction`'s is u itself, held fixed.
"""

from __future__ import annotations

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
    """A batch on its way from data to noise.

    Attributes:
        x: (B, F, C, H, W) points x_t, float32 or float64.
        velocity: `z - x0`, like x.
        t, r: (B,) times, in the dtype of x.
        condition: the text, with some samples' replaced by the negative prompt.
        negative: the negative prompt for all B samples.
        dropped: of each sample, whether its text is the negative prompt.
    """

    x: Tensor
    velocity: Tensor
    t: Tensor
    r: Tensor
    condition: Condition
    negative: Condition
    dropped: tuple[bool, ...]


@dataclass(frozen=True)
class Regression:
    """What the student learns at r = t, before the time derivative is taken off.

    Attributes:
        velocity: (B, F, C, H, W), no gradient: v_g.
        tangent: direction of the total derivative, like velocity.
        divisor: (B,) w^2, by which the loss is divided.
        own: (B,) factor of the student's own prediction, held fixed, that v_g holds beside `velocity`; None: of none.
    """

    velocity: Tensor
    tangent: Tensor
    divisor: Tensor
    own: Tensor | None = None

    def error(self, u: Tensor, goal: Tensor) -> Tensor:
        """(B,) losses of predictions u (B, F, C, H, W) whose goal was made of `velocity`."""
        if self.own is not None:
            goal = goal + expand_time(self.own, u) * u.detach()
        return square_error(u, goal, self.divisor)


def noised(batch: Batch, draw: Draw, t: Tensor, r: Tensor, text_dropout: float) -> Noised:
    """Draw the noise and the dropped texts of a batch; nothing here waits for the device."""
    if batch.positions != draw.positions:
        raise ValueError(f"the batch holds slots {batch.positions}, the random numbers are for {draw.positions}")
    x0 = at_least_float32(batch.latents)
    z = draw.normal("noise", tuple(x0.shape[1:])).to(x0.dtype)
    t, r = t.to(x0.dtype), r.to(x0.dtype)
    dropped = tuple(chance < text_dropout for chance in draw.chances("text dropout"))
    texts = zip(dropped, batch.condition.text, strict=True)
    text = torch.stack([batch.negative.text[0] if gone else given for gone, given in texts])
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
        guided = torch.lerp(_unconditional(roles.student, noised, noised.r), v, scale)
        own = _by_sample(noised, 1 - scale, 0.0) if any(noised.dropped) else None
        return Regression(guided, v, torch.full_like(noised.t, scale**2), own)
    row_scale = _by_sample(noised, 1.0, scale)
    guided = torch.lerp(_unconditional(teacher or roles.student, noised, noised.t), v, expand_time(row_scale, v))
    return Regression(guided, guided, row_scale.square())


def _unconditional(flow_map: FlowMap, noised: Noised, r: Tensor) -> Tensor:
    """The prediction for the negative prompt, like `x`; 0 on text-dropped samples, where nobody asks for it.

    It is called for one sample at least, since under ZeRO-3 a process that makes fewer calls hangs the others.
    """
    if not any(noised.dropped):
        return flow_map(noised.x, noised.t, r, noised.negative)
    kept = [row for row, gone in enumerate(noised.dropped) if not gone] or [0]
    found = flow_map(take(noised.x, kept), take(noised.t, kept), take(r, kept), noised.negative[kept])
    rows = dict(zip(kept, found, strict=True))
    nothing = torch.zeros_like(found[0])
    return torch.stack([nothing if gone else rows[row] for row, gone in enumerate(noised.dropped)])


def _by_sample(noised: Noised, dropped: float, kept: float) -> Tensor:
    """(B,) one number for text-dropped samples, and another for the others."""
    return torch.stack([torch.full_like(noised.t[0], dropped if gone else kept) for gone in noised.dropped])


def square_error(u: Tensor, goal: Tensor, divisor: Tensor) -> Tensor:
    """(B,) mean over a sample's elements of `(u - goal)^2`, divided by `divisor` (B,)."""
    return (u - goal).square().flatten(1).mean(dim=1) / divisor
