"""The average velocity on data (AnyFlow, section on forward training; MeanFlow's identity): stage 1.

`u(x_t, t, r) = v - (t - r) D_v u`, with the right-hand side held fixed. The student's one forward with gradient comes
last, so that nothing of the others is alive during the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.config import objective as options
from anyflow_train.config.positions import BranchCounts, rows_with_second_term
from anyflow_train.data.batch import Batch
from anyflow_train.flow.derivative import central_difference
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.path import expand_time
from anyflow_train.flow.times import draw_interval
from anyflow_train.flow.types import FlowMap
from anyflow_train.flow.weights import beta08, uniform
from anyflow_train.objectives.guidance import Noised, Regression, noised, regression
from anyflow_train.objectives.types import Loss, Roles, Setting


@dataclass(frozen=True)
class FlowMapObjective:
    """Stage 1 on one process's micro-batches: `FlowMapObjective.build(FlowMap(), Setting(global_batch=8))`.

    Attributes:
        config, times: see `config.objective`; `times.distribution` must be uniform.
        counts: branches of the global batch.
        world: number of data-parallel processes.
    """

    Config = options.FlowMap

    config: options.FlowMap
    times: options.Times
    counts: BranchCounts
    world: int = 1

    @classmethod
    def build(cls, config: options.FlowMap, setting: Setting) -> FlowMapObjective:
        """The objective of a run."""
        return cls(config, setting.times, setting.counts, setting.world)

    def __post_init__(self) -> None:
        if self.times.distribution != "uniform":
            raise ValueError("the flow map draws t and r from two uniforms; a logit-normal t has no r")

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        config, shift = self.config, self.times.shift
        interval = draw_interval(draw, self.counts, shift, self.times.precision)
        sample = noised(batch, draw, interval.t, interval.r, config.text_dropout)
        start = regression(roles, sample, config.guidance, config.guidance_scale, config.velocity)
        rows = rows_with_second_term(self.counts, draw.positions, self.world)
        goal = start.velocity if rows == 0 else self._corrected(roles.derivative, sample, start, rows)
        u = roles.student(sample.x, sample.t, sample.r, sample.condition)
        weight = beta08(sample.t, shift) if config.weight == "beta08" else uniform(sample.t)
        return Loss(start.error(u, goal), weight, interval.branch, {})

    @torch.no_grad()
    def _corrected(self, flow_map: FlowMap, sample: Noised, start: Regression, rows: int) -> Tensor:
        """`v_g - (t - r) D u`: the derivative is only taken for the last `rows` samples, the others have r = t."""
        last = slice(len(sample.x) - rows, None)
        derivative = central_difference(
            flow_map,
            sample.x[last],
            sample.t[last],
            sample.r[last],
            sample.condition[last],
            start.tangent[last],
            self.config.epsilon,
            self.config.derivative_ends,
            self.times.precision,
        )
        goal = start.velocity.clone()
        goal[last] -= expand_time(sample.t[last] - sample.r[last], derivative) * derivative
        return goal
