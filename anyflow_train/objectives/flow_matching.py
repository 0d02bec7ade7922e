"""Flow matching, `|| u(x_t, t, t) - (z - x0) ||^2`: stage 0, and the fake score of stage 2."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from anyflow_train.config import objective as options
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.times import draw_diffusion_time
from anyflow_train.flow.weights import uniform
from anyflow_train.objectives.guidance import noised, regression
from anyflow_train.objectives.types import Branch, Loss, Roles, Setting


@dataclass(frozen=True)
class FlowMatchingObjective:
    """Every sample is diffusion, r = t; of `times`, the branch shares do not matter here."""

    Config = options.FlowMatching

    config: options.FlowMatching
    times: options.Times = field(default_factory=options.Times)

    @classmethod
    def build(cls, config: options.FlowMatching, setting: Setting) -> FlowMatchingObjective:
        """The objective of a run."""
        return cls(config, setting.times)

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        times = self.times
        t = draw_diffusion_time(draw, times.distribution, times.shift, times.precision)
        sample = noised(batch, draw, t, t, self.config.text_dropout)
        goal = regression(roles, sample, self.config.guidance, self.config.guidance_scale, "data")
        u = roles.student(sample.x, sample.t, sample.t, sample.condition)
        branch = torch.full_like(sample.t, Branch.DIFFUSION, dtype=torch.int64)
        return Loss(goal.error(u, goal.velocity), uniform(sample.t), branch, {})
