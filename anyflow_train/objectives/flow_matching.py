"""Stage 0: flow matching, `|| u(x_t, t, t) - (z - x0) ||^2`."""

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
    """The objective of stage 0: the velocity at r = t, learned on data.

    Example:
        objective = FlowMatchingObjective.build(FlowMatching(), Setting(global_batch=8))
        loss = objective(Roles(student=student, derivative=student), batch, draw)

    Attributes:
        config: keys of the objective, see `config.objective.FlowMatching`.
        times: how t is drawn. The branch shares are not used, because all samples are on the diffusion branch.
    """

    Config = options.FlowMatching

    config: options.FlowMatching
    times: options.Times = field(default_factory=options.Times)

    @classmethod
    def build(cls, config: options.FlowMatching, setting: Setting) -> FlowMatchingObjective:
        """Build the objective of a run."""
        return cls(config, setting.times)

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        times = self.times
        t = draw_diffusion_time(draw, times.distribution, times.shift, times.precision)
        sample = noised(batch, draw, t, t, self.config.text_dropout)
        goal = regression(roles, sample, self.config.guidance, self.config.guidance_scale, "data")
        u = roles.student(sample.x, sample.t, sample.t, sample.condition)
        branch = torch.full_like(sample.t, Branch.DIFFUSION, dtype=torch.int64)
        return Loss(goal.error(u, goal.velocity), uniform(sample.t), branch, {})
