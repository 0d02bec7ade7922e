"""Stage 1: several objectives at once, each with its share of the samples with r < t.

The Lagrangian follows the teacher's ODE closely, the semigroup is better with few calls; a mix has both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from anyflow_train.config import objectives as options
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.lagrangian import LagrangianObjective
from anyflow_train.objectives.map_loss import Part, map_loss
from anyflow_train.objectives.semigroup import SemigroupObjective
from anyflow_train.objectives.types import Loss, Roles, Setting

MEMBERS: Mapping[str, Any] = MappingProxyType(
    {"flow_map": FlowMapObjective, "lagrangian": LagrangianObjective, "semigroup": SemigroupObjective}
)


@dataclass(frozen=True)
class MixedObjective:
    """The mix of `flow_map`, `lagrangian` and `semigroup` that `objective.shares` names.

    Positions are assigned like branches, over the global batch: each objective has its share of the samples with r = 0
    and of the free ones, and all processes hold equally many of each in a micro-step if their number divides the
    counts. Otherwise some targets are computed in vain, so that the calls are the same on every process.

    Example:
        objective = MixedObjective.build(Mixed(), Setting(global_batch=16))
        loss = objective(Roles(student, derivative=student, teacher=teacher), batch, draw)

    Attributes:
        config: keys of the objective, see `config.objectives.Mixed`.
        setting: properties of the run.
        parts: the objectives' targets and positions.
    """

    Config = options.Mixed

    config: options.Mixed
    setting: Setting
    parts: tuple[Part, ...]

    @classmethod
    def build(cls, config: options.Mixed, setting: Setting) -> MixedObjective:
        """Build the objective of a run. Raises ValueError if an objective has a share, but no samples."""
        parts = []
        for name, positions in config.positions(setting.counts).items():
            member = MEMBERS[name]
            keys = member.Config.model_fields.keys() & options.Mixed.model_fields.keys() - {"kind"}
            built = member.build(member.Config(**{key: getattr(config, key) for key in keys}), setting)
            parts.append(Part(built.target, positions, f"loss_{name}", getattr(config.weights, name)))
        return cls(config, setting, tuple(parts))

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss:
        return map_loss(self.config, self.setting, self.parts, roles, batch, draw)
