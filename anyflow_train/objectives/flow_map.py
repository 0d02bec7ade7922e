"""Stage 1: learn the average velocity on data (AnyFlow, section on forward training; MeanFlow's identity).

The student u is regressed to `v - (t - r) D_v u`, which carries no gradient. Its forward with gradient comes last, so
that the memory of the other forwards is free during the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.config import objectives as options
from anyflow_train.config.objective import Times
from anyflow_train.config.positions import BranchCounts, rows_with_second_term
from anyflow_train.data.batch import Batch
from anyflow_train.flow.derivative import central_difference, exact_derivative
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.path import expand_time
from anyflow_train.flow.times import draw_interval
from anyflow_train.flow.types import FlowMap
from anyflow_train.flow.weights import beta08, uniform
from anyflow_train.objectives.guidance import Noised, Regression, regression
from anyflow_train.objectives.source import draw_points
from anyflow_train.objectives.types import Loss, Roles, Setting


@dataclass(frozen=True)
class FlowMapObjective:
    """The objective of stage 1: the average velocity between two times, learned on data.

    Example:
        objective = FlowMapObjective.build(FlowMap(), Setting(global_batch=8))
        loss = objective(Roles(student=student, derivative=student), batch, draw)

    Attributes:
        config: keys of the objective, see `config.objectives.FlowMap`.
        times: how t and r are drawn; `times.distribution` must be `uniform`.
        counts: number of samples of each branch in the global batch.
        world: number of data-parallel processes.

    Raises:
        ValueError: `times.distribution` is not `uniform`.
    """

    Config = options.FlowMap

    config: options.FlowMap
    times: Times
    counts: BranchCounts
    world: int = 1

    @classmethod
    def build(cls, config: options.FlowMap, setting: Setting) -> FlowMapObjective:
        """Build the objective of a run."""
        return cls(config, setting.times, setting.counts, setting.world)

    def __post_init__(self) -> None:
        if self.times.distribution != "uniform":
            raise ValueError(f"times.distribution must be 'uniform' for the flow map, not {self.times.distribution!r}")

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        config, shift = self.config, self.times.shift
        interval = draw_interval(draw, self.counts, shift, self.times.precision)
        sample = draw_points(config, roles, batch, draw, interval)
        start = regression(roles, sample, config.guidance, config.guidance_scale, config.velocity)
        rows = rows_with_second_term(self.counts, draw.positions, self.world)
        goal = start.velocity if rows == 0 else self._corrected(roles.derivative, sample, start, rows)
        u = roles.student(sample.x, sample.t, sample.r, sample.condition)
        weight = beta08(sample.t, shift) if config.weight == "beta08" else uniform(sample.t)
        return Loss(start.error(u, goal), weight, interval.branch, {})

    def target(self, roles: Roles, sample: Noised, draw: Draw) -> Tensor:
        """Compute `v_g - (t - r) D u` for all samples, (B, F, C, H, W); see `objectives.map_loss.Target`."""
        start = regression(roles, sample, self.config.guidance, self.config.guidance_scale, self.config.velocity)
        return self._corrected(roles.derivative, sample, start, len(sample.x))

    @torch.no_grad()
    def _corrected(self, flow_map: FlowMap, sample: Noised, start: Regression, rows: int) -> Tensor:
        """Compute `v_g - (t - r) D u`. Only the last `rows` samples need the derivative; the others have r = t."""
        last = slice(len(sample.x) - rows, None)
        config, condition = self.config, sample.condition[last]
        at = (flow_map, sample.x[last], sample.t[last], sample.r[last], condition, start.tangent[last])
        if config.derivative == "jvp":
            derivative = exact_derivative(*at)
        else:
            derivative = central_difference(*at, config.epsilon, config.derivative_ends, self.times.precision)
        goal = start.velocity.clone()
        goal[last] -= expand_time(sample.t[last] - sample.r[last], derivative) * derivative
        return goal
