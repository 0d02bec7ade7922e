"""Stage 1: learn a jump from two shorter jumps (shortcut models, Frans et al. 2024, with any intermediate time).

From `X(x, t, r) = X(X(x, t, s), s, r)` with `X = x - (t - r) u(x, t, r)`, the student u is regressed to
`l u(x, t, s) + (1 - l) u(X(x, t, s), s, r)` with `l = (t - s) / (t - r)`, without gradient. The flow map of any ODE
fulfils this: only the samples with r = t know the teacher's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_train.config import objectives as options
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.path import expand_time
from anyflow_train.objectives.guidance import Noised
from anyflow_train.objectives.map_loss import OneTarget
from anyflow_train.objectives.types import Roles


@dataclass(frozen=True)
class SemigroupObjective(OneTarget):
    """The semigroup objective. For r < t it takes two calls of `derivative`; the teacher is only called at r = t.

    Example:
        objective = SemigroupObjective.build(Semigroup(), Setting(global_batch=8))
        loss = objective(Roles(student, derivative=student, teacher=teacher), batch, draw)

    Attributes:
        config: keys of the objective, see `config.objectives.Semigroup`.
    """

    Config = options.Semigroup

    config: options.Semigroup

    def target(self, roles: Roles, sample: Noised, draw: Draw) -> Tensor:
        """Compute the mean velocity of two jumps t -> s -> r, (B, F, C, H, W); s is uniform in [r, t]."""
        x, t, r, condition = sample.x, sample.t, sample.r, sample.condition
        s = torch.lerp(r, t, draw.uniform("intermediate time", 1).squeeze(1).to(t.dtype))
        first = roles.derivative(x, t, s, condition)
        second = roles.derivative(x - expand_time(t - s, x) * first, s, r, condition)
        share = torch.where(t > r, (t - s) / torch.where(t > r, t - r, 1), 1)
        return torch.lerp(second, first, expand_time(share, x))
