"""Arguments and result of an objective. Objectives only know flow maps, not networks or the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
    """The flow maps of a run: `Roles(student=student, derivative=student)` for one without teacher.

    Attributes:
        student: the network that is trained; gradients flow through it.
        derivative: the student or its EMA, without gradient, in the precision of the time derivative.
        teacher: the frozen teacher, called at r = t; None if the run has no teacher.
        fake_score: the velocity of the student's samples, called at r = t; None if the run has no fake score.
    """

    student: FlowMap
    derivative: FlowMap
    teacher: FlowMap | None = None
    fake_score: FlowMap | None = None

    def wrapped(self, wrap: Callable[[str, FlowMap], FlowMap]) -> Roles:
        """Return the roles with each flow map replaced by `wrap(name, flow_map)`."""
        return Roles(**{name: flow_map and wrap(name, flow_map) for name, flow_map in vars(self).items()})


@dataclass(frozen=True)
class Loss:
    """The losses of B samples, before rebalancing.

    Attributes:
        per_sample: (B,) float32 mean square error over the elements of a sample, before the weight w(t). It carries the
            gradient.
        weight: (B,) float32 weight w(t).
        branch: (B,) int64 `Branch`; None for an objective without branches.
        metrics: name -> (B,) detached values for the log.
        pieces: computes `per_sample` once more as a sum of (B,) tensors that carry the gradient, one after the other,
            so that only one graph is in memory. Only without branches. None if `per_sample` carries it.
    """

    per_sample: Tensor
    weight: Tensor
    branch: Tensor | None
    metrics: dict[str, Tensor]
    pieces: Callable[[], Iterator[Tensor]] | None = None

    def parts(self) -> Iterator[Loss]:
        """Iterate over losses that carry the gradient and add up to this one. Each needs a backward pass."""
        if self.pieces is None:
            yield self
        else:
            yield from (replace(self, per_sample=piece) for piece in self.pieces())


@dataclass(frozen=True)
class Setting:
    """Properties of a run that an objective needs in addition to its own config.

    Attributes:
        global_batch: number of samples per step, over all processes.
        times: how t and r are drawn.
        world: number of data-parallel processes.
    """

    global_batch: int
    times: Times = field(default_factory=Times)
    world: int = 1

    @property
    def counts(self) -> BranchCounts:
        """Number of samples of each branch per step.

        Raises:
            ValueError: the batch is too small for a sample of each branch.
        """
        return branch_counts(self.global_batch, self.times.diffusion_share, self.times.consistency_share)

    @property
    def positions_below(self) -> range:
        """Positions of the global batch with r < t."""
        return range(self.counts.diffusion, self.global_batch)


class Objective(Protocol):
    """Interface of an objective: flow maps, samples and random numbers in, losses out."""

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss: ...
