"""The loss of objectives that regress u(x, t, r) to the velocity at r = t, and to a target of their own at r < t."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from anyflow_train.config.objectives import AverageVelocity
from anyflow_train.config.positions import rows_of
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.times import draw_interval
from anyflow_train.flow.weights import beta08, uniform
from anyflow_train.objectives.guidance import Noised, divisor, regression, square_error
from anyflow_train.objectives.source import draw_points
from anyflow_train.objectives.types import Loss, Roles, Setting


class Target(Protocol):
    """Computes targets (R, F, C, H, W) of u(x, t, r) for R samples, without gradient."""

    def __call__(self, roles: Roles, sample: Noised, draw: Draw) -> Tensor: ...


@dataclass(frozen=True)
class Part:
    """Positions of the global batch with r < t that share a target.

    Attributes:
        target: computes the target. All processes call it in the same micro-steps, with equally many samples.
        positions: the positions, as ranges.
        name: name of its mean loss in the log; empty for none.
        weight: factor of its losses, after rebalancing.
    """

    target: Target
    positions: tuple[range, ...]
    name: str = ""
    weight: float = 1.0

    @property
    def size(self) -> int:
        """Number of positions."""
        return sum(map(len, self.positions))

    def has(self, position: int) -> bool:
        """Return whether a position belongs to the part."""
        return any(position in each for each in self.positions)


def map_loss(
    config: AverageVelocity, setting: Setting, parts: Sequence[Part], roles: Roles, batch: Batch, draw: Draw
) -> Loss:
    """Compute the losses of B samples. The student's forward with gradient comes last (see `objectives.flow_map`).

    Args:
        config: keys of the objective.
        setting: properties of the run.
        parts: the targets; together they cover all positions with r < t.
        roles: flow maps of the run.
        batch: B samples.
        draw: random numbers of the same positions.
    """
    times = setting.times
    interval = draw_interval(draw, setting.counts, times.shift, times.precision)
    sample = draw_points(config, roles, batch, draw, interval)
    goal = _goal(config, setting, parts, roles, sample, draw)
    u = roles.student(sample.x, sample.t, sample.r, sample.condition)
    weight = beta08(sample.t, times.shift) if config.weight == "beta08" else uniform(sample.t)
    per_sample = square_error(u, goal, divisor(sample, config.guidance, config.guidance_scale))
    metrics = {}
    for part in parts if len(parts) > 1 else ():
        own = torch.tensor([float(part.has(position)) for position in draw.positions])
        own = own.to(weight, non_blocking=True)
        weight = torch.where(own > 0, part.weight * weight, weight)
        # The log divides by the global batch, the mean is over the part.
        metrics[part.name] = per_sample.detach() * own * (setting.global_batch / part.size)
    return Loss(per_sample, weight, interval.branch, metrics)


@dataclass(frozen=True)
class OneTarget(ABC):
    """Base class of the objectives with one target for all samples with r < t.

    Attributes:
        config: keys of the objective.
        setting: properties of the run.
    """

    config: AverageVelocity
    setting: Setting

    @classmethod
    def build(cls, config: AverageVelocity, setting: Setting) -> Self:
        """Build the objective of a run."""
        return cls(config, setting)

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        part = Part(self.target, (self.setting.positions_below,))
        return map_loss(self.config, self.setting, [part], roles, batch, draw)

    @abstractmethod
    def target(self, roles: Roles, sample: Noised, draw: Draw) -> Tensor:
        """Compute the targets of all samples; see `Target`."""


@torch.no_grad()
def _goal(
    config: AverageVelocity, setting: Setting, parts: Sequence[Part], roles: Roles, sample: Noised, draw: Draw
) -> Tensor:
    """Compute the regression targets (B, F, C, H, W). Every target is called for as few samples as possible."""
    positions, goal = draw.positions, list(torch.zeros_like(sample.x))
    diffusion = Part(lambda roles, sample, draw: velocity(config, roles, sample), (range(setting.counts.diffusion),))
    for part in (diffusion, *parts):
        rows = sorted({row for each in part.positions for row in rows_of(each, positions, setting.world)})
        if not rows:
            continue
        values = part.target(roles, sample[rows], replace(draw, positions=tuple(positions[row] for row in rows)))
        for row, value in zip(rows, values, strict=True):
            if part.has(positions[row]):
                goal[row] = value
    return torch.stack(goal)


def velocity(config: AverageVelocity, roles: Roles, sample: Noised) -> Tensor:
    """Compute the velocity at (x, t), guided if the config says so, (B, F, C, H, W)."""
    return regression(roles, sample, config.guidance, config.guidance_scale, config.velocity).velocity
