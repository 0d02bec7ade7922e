"""An objective in one file: shortcut models (arXiv 2410.12557), which learn one long jump from two half jumps.

Run it from this folder, or with this folder on PYTHONPATH:

    anyflow train experiment=tiny objective.kind=shortcut:Shortcut objective.jumps=student
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from anyflow_train.config.objective import Derivative, ObjectiveConfig, Rebalancing, Share, Times
from anyflow_train.config.positions import BranchCounts, rows_with_second_term
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.path import expand_time
from anyflow_train.flow.times import draw_interval
from anyflow_train.flow.types import FlowMap
from anyflow_train.objectives.guidance import Noised, noised, square_error
from anyflow_train.objectives.types import Loss, Roles, Setting


class ShortcutConfig(ObjectiveConfig):
    """Learn the velocity at r = t from data, and u(x, t, r) at r < t from two jumps of half the length.

    jumps: weights for the half jumps: the student's or their moving average.
    text_dropout: share of samples whose text is replaced by the negative prompt.
    """

    jumps: Literal["student", "ema"] = "ema"
    text_dropout: Share = 0.1

    @property
    def derivative_role(self) -> Derivative:
        """The half jumps call the role `derivative`: the chosen weights, without gradient."""
        return Derivative(network=self.jumps)

    @property
    def rebalancing(self) -> Rebalancing:
        """Scale samples with r < t to the mean diffusion loss, as for the flow map."""
        return Rebalancing("weighted", floor=0.05)


@dataclass(frozen=True)
class Shortcut:
    """Compute the losses of one process's micro-batches."""

    Config = ShortcutConfig

    config: ShortcutConfig
    times: Times
    counts: BranchCounts
    world: int

    @classmethod
    def build(cls, config: ShortcutConfig, setting: Setting) -> Shortcut:
        """Build the objective of a run."""
        return cls(config, setting.times, setting.counts, setting.world)

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        """Compute the loss per sample. Samples with r < t come last, so only the last rows need half jumps."""
        interval = draw_interval(draw, self.counts, self.times.shift, self.times.precision)
        sample = noised(batch, draw, interval.t, interval.r, self.config.text_dropout)
        rows = rows_with_second_term(self.counts, draw.positions, self.world)
        goal = sample.velocity.clone()
        if rows:
            last = slice(len(goal) - rows, None)
            goal[last] = half_jumps(roles.derivative, sample, goal, last)
        u = roles.student(sample.x, sample.t, sample.r, sample.condition)
        one = torch.ones_like(sample.t)
        return Loss(square_error(u, goal, one), one, interval.branch, {})


@torch.no_grad()
def half_jumps(flow_map: FlowMap, sample: Noised, velocity: Tensor, rows: slice) -> Tensor:
    """Compute the mean velocity (R, F, C, H, W) of two jumps t -> (t + r) / 2 -> r; rows with r = t keep theirs."""
    x, t, r, condition = sample.x[rows], sample.t[rows], sample.r[rows], sample.condition[rows]
    middle = (t + r) / 2
    first = flow_map(x, t, middle, condition)
    second = flow_map(x - expand_time(t - middle, x) * first, middle, r, condition)
    return torch.where(expand_time(r < t, x), (first + second) / 2, velocity[rows])
