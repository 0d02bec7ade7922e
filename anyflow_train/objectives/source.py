"""Points x_t of the training samples: on the path from data to noise, or made by the student itself, without clips."""

from __future__ import annotations

import torch

from anyflow_train.config.objectives import AverageVelocity
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.path import at_least_float32, expand_time
from anyflow_train.flow.times import Interval
from anyflow_train.flow.types import FlowMap, put, take
from anyflow_train.objectives.guidance import Noised, drop_texts, noised
from anyflow_train.objectives.types import Branch, Roles


def draw_points(config: AverageVelocity, roles: Roles, batch: Batch, draw: Draw, interval: Interval) -> Noised:
    """Draw the points of B samples, as `objective.source` says.

    Args:
        config: keys of the objective.
        roles: flow maps of the run.
        batch: B samples; for points from the student, only the shape of their latents is used.
        draw: random numbers of the same positions.
        interval: times of the samples.

    Raises:
        ValueError: batch and random numbers have different positions, or the latents have no shape (B, F, C, H, W).
    """
    if config.source == "data":
        return noised(batch, draw, interval.t, interval.r, config.text_dropout)
    if batch.latents.ndim != 5:
        raise ValueError(f"points from the student need the shape of the latents, not {tuple(batch.latents.shape)}")
    return from_student(config, roles.derivative, batch, draw, interval)


@torch.no_grad()
def from_student(config: AverageVelocity, student: FlowMap, batch: Batch, draw: Draw, interval: Interval) -> Noised:
    """Draw noise at t = 1 for a share of the samples, and `X(z, 1, t)` for the others, with one call of the student.

    A sample that starts at noise gets t = 1; its r is then 1 if it was t. Arguments are those of `draw_points`.
    """
    starts = tuple(chance < config.noise_share for chance in draw.chances("start at noise"))
    z = at_least_float32(draw.normal("noise", tuple(batch.latents.shape[1:])))
    t, r = interval.t.to(z.dtype), interval.r.to(z.dtype)
    one = torch.ones_like(t)
    t = torch.where(torch.tensor(starts).to(t.device, non_blocking=True), one, t)
    r = torch.where(interval.branch == Branch.DIFFUSION, t, r)
    condition, negative, dropped = drop_texts(batch, draw, config.text_dropout)
    # At least one sample, so that all processes make the call: under ZeRO-3 one with fewer calls would hang the others.
    moved = [row for row, start in enumerate(starts) if not start] or [0]
    noise, time = take(z, moved), take(t, moved)
    u = student(noise, take(one, moved), time, condition[moved])
    x = put(z, moved, noise - expand_time(1 - time, noise) * u)
    return Noised(x, torch.full_like(x, torch.nan), t, r, condition, negative, dropped)
