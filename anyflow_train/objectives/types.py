"""What an objective sees and what it returns. Objectives know flow maps, never networks or the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from anyflow_train.config.objective import Times
from anyflow_train.config.positions import Branch, BranchCounts, branch_counts
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import FlowMap

__all__ = ["Branch", "Loss", "Objective", "Roles", "Setting"]


@dataclass(frozen=True)
class Roles:
    """The flow maps of a run.

    Attributes:
        student: what is trained; gradients flow through it.
        derivative: the student, or its EMA, without gradient and in the precision of the time derivative.
        teacher: the frozen teacher, called at r = t; None where the run has none.
        fake_score: the velocity of the student's own samples, called at r = t; None where the run has none.
    """

    student: FlowMap
    derivative: FlowMap
    teacher: FlowMap | None = None
    fake_score: FlowMap | None = None


@dataclass(frozen=True)
class Loss:
    """The losses of B samples, before rebalancing.

    Attributes:
        per_sample: (B,) float32, mean square error over a sample's elements, before the weight w(t); carries the
            gradient.
        weight: (B,) float32, w(t).
        branch: (B,) int64, `Branch`; None for an objective without branches.
        metrics: name -> (B,) detached values to log.
    """

    per_sample: Tensor
    weight: Tensor
    branch: Tensor | None
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What an objective is built for, in addition to its own config.

    Attributes:
        global_batch: samples of a step, over all processes.
        times: how (t, r) are drawn.
        world: number of data-parallel processes.
    """

    global_batch: int
    times: Times = field(default_factory=Times)
    world: int = 1

    @property
    def counts(self) -> BranchCounts:
        """Samples of each branch in a step. ValueError: the batch is too small to hold all of them."""
        return branch_counts(self.global_batch, self.times.diffusion_share, self.times.consistency_share)


class Objective(Protocol):
    """A term of an update: flow maps, samples and random numbers in, losses out."""

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss: ...
