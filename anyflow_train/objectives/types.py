"""What an objective sees and what it returns. Objectives know flow maps, never networks or the engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from torch import Tensor

from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import FlowMap


class Branch(IntEnum):
    """Which part of the triangle 0 <= r <= t a sample trains."""

    DIFFUSION = 0  # r = t
    CONSISTENCY = 1  # r = 0
    FREE = 2


@dataclass(frozen=True)
class Roles:
    """The flow maps of a run.

    Attributes:
        student: what is trained; gradients flow through it.
        derivative: the student, or its EMA, without gradient and in the precision of the time derivative.
        teacher: the frozen teacher, called at r = t; None where the run has none.
    """

    student: FlowMap
    derivative: FlowMap
    teacher: FlowMap | None = None


@dataclass(frozen=True)
class Loss:
    """The losses of B samples, before rebalancing.

    Attributes:
        per_sample: (B,) float32, unweighted mean square error over a sample's elements; carries the gradient.
        weight: (B,) float32, w(t).
        branch: (B,) int64, `Branch`.
        metrics: name -> (B,) detached values to log.
    """

    per_sample: Tensor
    weight: Tensor
    branch: Tensor
    metrics: dict[str, Tensor]


class Objective(Protocol):
    """A term of an update: flow maps, samples and random numbers in, losses out."""

    def __call__(self, roles: Roles, batch: Batch, draw: Draw) -> Loss: ...
