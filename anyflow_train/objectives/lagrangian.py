"""Stage 1: follow the teacher's velocity at the end of each jump (Boffi et al. 2024, "Flow map matching").

From `d_r X(x, t, r) = v(X, r)` with `X = x - (t - r) u(x, t, r)`, the student u is regressed to
`v(X(x, t, r), r) + (t - r) d_r u(x, t, r)`, without gradient. With the teacher's velocity, the only solution is the
flow map of the (guided) teacher's ODE, wherever the points x come from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from anyflow_train.config import objectives as options
from anyflow_train.flow.derivative import exact_target_derivative, target_secant
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.path import expand_time
from anyflow_train.objectives.guidance import Noised
from anyflow_train.objectives.map_loss import OneTarget, velocity
from anyflow_train.objectives.types import Roles


@dataclass(frozen=True)
class LagrangianObjective(OneTarget):
    """The Lagrangian objective. For r < t it takes two calls of `derivative` and one of the (guided) teacher.

    With `objective.velocity=data` the velocity at the end of a jump is the student's own, `u(X, r, r)`, which
    learns from data at r = t (self-distillation, Boffi et al. 2025).

    Example:
        objective = LagrangianObjective.build(Lagrangian(), Setting(global_batch=8))
        loss = objective(Roles(student, derivative=student, teacher=teacher), batch, draw)

    Attributes:
        config: keys of the objective, see `config.objectives.Lagrangian`.
    """

    Config = options.Lagrangian

    config: options.Lagrangian

    def target(self, roles: Roles, sample: Noised, draw: Draw) -> Tensor:
        """Compute `v(X, r) + (t - r) d_r u`, (B, F, C, H, W)."""
        x, t, r, condition = sample.x, sample.t, sample.r, sample.condition
        length = expand_time(t - r, x)
        at = (roles.derivative, x, t, r, condition)
        exact = self.config.derivative == "jvp"
        u, slope = exact_target_derivative(*at) if exact else target_secant(*at, self.config.epsilon)
        end = replace(sample, x=x - length * u, t=r)
        own = self.config.velocity == "data"
        found = roles.derivative(end.x, r, r, condition) if own else velocity(self.config, roles, end)
        return found + length * slope
