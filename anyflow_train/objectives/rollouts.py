"""The student's own samples, by flow-map backward simulation: what stage 2 learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.flow.causal import chunk_by_chunk
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.rollout import FirstJump, rollout
from anyflow_train.flow.types import CausalFlowMap, Condition, FlowMap


@dataclass(frozen=True)
class Rollout:
    """Samples (B, F, C, H, W) float32, and the number of steps N of the sampler that they followed."""

    x: Tensor
    steps: int


@dataclass(frozen=True)
class Rollouts:
    """Rolls the student out from fresh noise.

    N and g are the same for all samples of a step: processes that made another number of calls would hang each other
    under ZeRO-3.

    Attributes:
        latent: (F, C, H, W) of one sample.
        steps: N is one of these, g one of 0..N-1.
        shift: of the sampler's times.
        first_jump: see `flow.rollout`.
        chunks: of a causal student, which rolls out one after the other, each from those before it; None: all at once.
    """

    latent: tuple[int, int, int, int]
    steps: tuple[int, ...]
    shift: float
    first_jump: FirstJump
    chunks: Chunks | None = None

    def __call__(self, student: FlowMap, condition: Condition, draw: Draw) -> Rollout:
        """Samples for these texts; gradient flows back into the student unless it is switched off."""
        which, where = draw.shared("steps", 2)
        steps = self.steps[int(which * len(self.steps))]
        z = draw.normal("noise", self.latent)

        def generate(z: Tensor, condition: Condition) -> Tensor:
            return rollout(student, z, condition, steps, int(where * steps), self.shift, self.first_jump)

        if self.chunks is None:
            return Rollout(generate(z, condition), steps)
        return Rollout(chunk_by_chunk(cast(CausalFlowMap, student), z, condition, self.chunks, generate), steps)


class RolloutBuffer:
    """The rollouts of the student's update, for a fake score that learns from the same ones in the same step."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, tuple[int, ...]], Rollout] = {}

    def put(self, draw: Draw, made: Rollout) -> None:
        """Remember a micro-batch's samples, without their graph."""
        self._kept[draw.step, draw.positions] = Rollout(made.x.detach(), made.steps)

    def pop(self, draw: Draw) -> Rollout | None:
        """The samples of a micro-batch, once; None in a step without an update of the student."""
        return self._kept.pop((draw.step, draw.positions), None)
