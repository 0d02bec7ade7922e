"""Rollouts of the student by flow-map backward simulation: the samples of stage 2."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.flow.causal import Generate, chunk_by_chunk, next_chunk
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.rollout import FirstJump, rollout
from anyflow_train.flow.types import CausalFlowMap, Condition, FlowMap


@dataclass(frozen=True)
class Rollout:
    """Samples of the student.

    Attributes:
        x: (B, F, C, H, W) float32.
        steps: number of steps N of the sampler.
    """

    x: Tensor
    steps: int


@dataclass(frozen=True)
class Rollouts:
    """Rolls the student out from noise, around step g of a sampler with N steps.

    N and g are the same for all samples of a step. Under ZeRO-3, processes with different numbers of network calls
    would hang.

    Attributes:
        steps: choices of N; g is drawn from 0..N-1.
        shift: time shift of the sampler.
        first_jump: see `flow.rollout.rollout`.
        chunks: chunks of a causal student, which rolls out one after the other; None rolls out all frames together.
    """

    steps: tuple[int, ...]
    shift: float
    first_jump: FirstJump
    chunks: Chunks | None = None

    def __call__(self, student: FlowMap, condition: Condition, draw: Draw, latent: tuple[int, ...]) -> Rollout:
        """Roll out one sample of shape `latent` (F, C, H, W) per text.

        Gradient flows into the student, unless gradients are disabled.
        """
        z, steps, generate = self._drawn(student, draw, latent)
        if self.chunks is None:
            return Rollout(generate(z, condition), steps)
        return Rollout(chunk_by_chunk(cast(CausalFlowMap, student), z, condition, self.chunks, generate), steps)

    def replay(self, student: FlowMap, condition: Condition, draw: Draw, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Generate each chunk of a clip again, with gradient. The graph of a chunk can be freed before the next one.

        Args:
            student, condition, draw: those that gave the clip.
            x: (B, F, C, H, W) the clip.

        Yields:
            Frames of a chunk in the clip, and the chunk (B, f, C, H, W).
        """
        assert self.chunks is not None  # a rule of the config
        z, _, generate = self._drawn(student, draw, tuple(x.shape[1:]))
        for seen in self.chunks.growing():
            frames = slice(sum(seen[:-1]), sum(seen))
            causal = cast(CausalFlowMap, student)
            yield frames, next_chunk(causal, x[:, : frames.start], z, condition, seen, generate)

    def _drawn(self, student: FlowMap, draw: Draw, latent: tuple[int, ...]) -> tuple[Tensor, int, Generate]:
        """Draw the noise of a clip, the number of steps, and the jumps of a rollout."""
        which, where = draw.shared("steps", 2)
        steps = self.steps[int(which * len(self.steps))]

        def generate(z: Tensor, condition: Condition) -> Tensor:
            return rollout(student, z, condition, steps, int(where * steps), self.shift, self.first_jump)

        return draw.normal("noise", latent), steps, generate


class RolloutBuffer:
    """Hands the rollouts of the student's update to the fake score's update in the same step."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, int, tuple[int, ...]], Rollout] = {}

    def put(self, draw: Draw, turn: int, rollout: Rollout) -> None:
        """Store the detached samples of a micro-batch. turn: see `data.batch.Batch`."""
        self._kept[draw.step, turn, draw.positions] = Rollout(rollout.x.detach(), rollout.steps)

    def pop(self, draw: Draw, turn: int) -> Rollout | None:
        """Remove and return the samples of a micro-batch; None in a step without an update of the student."""
        return self._kept.pop((draw.step, turn, draw.positions), None)
