"""Config of stage 2: training a student on its own rollouts."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model
from anyflow_train.config.network import FullTraining, Lora
from anyflow_train.config.objective import Share

Backward = Literal["clip", "chunk"]


class NoOnPolicy(Model):
    """Stages 0 and 1: train only on data."""

    # Weight of the run's objective, the only loss.
    objective_weight: ClassVar[float] = 1.0

    kind: Literal["none"] = "none"

    @property
    def matching(self) -> DistributionMatching | None:
        """Settings of stage 2: None."""
        return None


class ScoreTimes(Model):
    """Times of noised rollouts: drawn from the distribution, shifted, then clamped to [low, high]."""

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    shift: PositiveFloat = 5.0
    low: Share = 0.0
    high: Share = 1.0


class FakeScore(Model):
    """The network that learns the velocity of the student's samples by flow matching.

    init: initial network (Wan2.1 or AnyFlow folder or hub id, or a run).
    adapter: full trains a network of its own. lora trains an adapter on the student's frozen base; student, fake score
        and teacher then share this one network in memory.
    lr: learning rate; the other optimizer values are the student's.
    updates: updates of the fake score for each update of the student; the student is updated every `updates` steps.
    rollout: training samples: fresh rollouts, or the rollouts of the student's update in the same step.
    times: times at which the fake score is trained.
    """

    init: str
    adapter: Annotated[FullTraining | Lora, Field(discriminator="kind")] = FullTraining()
    lr: PositiveFloat = 2e-6
    updates: PositiveInt = 1
    rollout: Literal["fresh", "student"] = "fresh"
    times: ScoreTimes = ScoreTimes(distribution="logit_normal")


class DistributionMatching(Model):
    """Stage 2: move rollouts towards samples that the teacher prefers to the fake score (DMD).

    calls: numbers of network calls to draw from; a rollout uses a sampler with that many.
    shift: timestep shift of that sampler.
    first_jump: whether the gradient also flows through the jump from noise to the middle of the rollout.
    backward: clip keeps the graph of a whole rollout for one backward pass. chunk rolls out without a graph, and
        computes each chunk of a causal student again for a backward pass of its own: less memory, more time, equal
        gradients.
    guidance_scale: CFG scale w of the teacher; 1 means no guidance. The published k = 3 is w = 4.
    weight: weight of this loss.
    objective_weight: weight of the loss of `objective`, which is trained at the same time; 0 leaves it out.
    score_times: times at which fake score and teacher are compared.
    """

    kind: Literal["distribution_matching"]
    calls: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (2, 4, 8, 16, 50)
    shift: PositiveFloat = 5.0
    first_jump: Literal["gradient", "detached"] = "gradient"
    backward: Backward = "clip"
    guidance_scale: PositiveFloat = 1.0
    weight: PositiveFloat = 1.0
    objective_weight: NonNegativeFloat = 1.0
    score_times: ScoreTimes = ScoreTimes()
    fake_score: FakeScore

    @property
    def matching(self) -> DistributionMatching | None:
        """Settings of stage 2: this config."""
        return self


OnPolicy = Annotated[NoOnPolicy | DistributionMatching, Field(discriminator="kind")]
