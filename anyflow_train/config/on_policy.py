"""Config of stage 2: what a student learns from its own rollouts."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model
from anyflow_train.config.network import FullTraining, Lora
from anyflow_train.config.objective import Share


class NoOnPolicy(Model):
    """The student learns from data alone."""

    # Of the run's objective, which is all that is trained.
    objective_weight: ClassVar[float] = 1.0

    kind: Literal["none"] = "none"

    @property
    def matching(self) -> DistributionMatching | None:
        """The settings of stage 2: there are none."""
        return None


class ScoreTimes(Model):
    """Times of noised rollouts: drawn from the distribution, shifted, then kept in [low, high]."""

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    shift: PositiveFloat = 5.0
    low: Share = 0.0
    high: Share = 1.0


class FakeScore(Model):
    """The network that learns, by flow matching, the velocity of the student's own samples.

    init: network that it begins as (Wan2.1 or AnyFlow folder or hub id, or a run).
    adapter: full trains that network. lora: an adapter on the student's frozen base, which is then the teacher's and
        the only network in memory; it begins as that base.
    lr: its learning rate; all else of its optimizer is the student's.
    updates: its updates for each of the student's; the student's is made every so many steps.
    rollout: what it learns from: fresh rollouts of its own, or those of the student's update in the same step.
    times: at which it learns.
    """

    init: str
    adapter: Annotated[FullTraining | Lora, Field(discriminator="kind")] = FullTraining()
    lr: PositiveFloat = 2e-6
    updates: PositiveInt = 1
    rollout: Literal["fresh", "student"] = "fresh"
    times: ScoreTimes = ScoreTimes(distribution="logit_normal")


class DistributionMatching(Model):
    """Rollouts are moved to where the teacher finds them likelier than the fake score does (DMD).

    steps: a rollout follows a sampler of N steps, N being one of these.
    shift: of that sampler's times.
    first_jump: whether the gradient goes through the jump from noise to the middle of the rollout as well.
    guidance_scale: CFG scale w of the teacher; 1 is none. The published k = 3 is w = 4.
    weight: of this loss; objective_weight: of `objective`, which goes on training beside it; 0 leaves it out.
    score_times: at which fake score and teacher are compared.
    """

    kind: Literal["distribution_matching"]
    steps: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (2, 4, 8, 16, 50)
    shift: PositiveFloat = 5.0
    first_jump: Literal["gradient", "detached"] = "gradient"
    guidance_scale: PositiveFloat = 1.0
    weight: PositiveFloat = 1.0
    objective_weight: NonNegativeFloat = 1.0
    score_times: ScoreTimes = ScoreTimes()
    fake_score: FakeScore

    @property
    def matching(self) -> DistributionMatching | None:
        """The settings of stage 2: these."""
        return self


OnPolicy = Annotated[NoOnPolicy | DistributionMatching, Field(discriminator="kind")]
