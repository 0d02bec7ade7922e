"""Base class of the objectives' configs, flow matching, and the drawn times.

The config class of an objective has its keys as fields, and its facts as class variables and properties. The rest of
the package (rules, recipe, dry run, model card) reads the facts and never checks the class. A new objective is
therefore one config class and one objective class. The other kinds are in `config.objectives`; for a user's own
objective see docs/extend.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from anyflow_train.config.base import Model
from anyflow_train.config.findings import Finding
from anyflow_train.config.positions import BranchCounts, branch_counts

Share = Annotated[float, Field(ge=0, le=1)]
Rebalance = Literal["weighted", "unweighted", "sqrt", "none"]


class Times(Model):
    """Distribution of the times (t, r). Shares refer to the global batch; the remaining samples have 0 <= r <= t.

    distribution: uniform (t and r are the larger and the smaller of two uniform numbers) or logit_normal (only t, for
        flow matching).
    shift: timestep shift of the drawn times; larger values draw more times near noise (t = 1).
    diffusion_share: share of samples with r = t.
    consistency_share: share of samples with r = 0.
    precision: bf16 rounds the drawn times as the published code does.
    """

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    shift: PositiveFloat = 5.0
    diffusion_share: Share = 0.5
    consistency_share: Share = 0.25
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class Rebalancing:
    """Scaling of losses at r < t to the mean loss of the diffusion samples, and the lower bound of that mean."""

    mode: Rebalance = "none"
    floor: float = 0.0


@dataclass(frozen=True)
class Derivative:
    """Settings of the role `derivative`, a network that is called without gradient.

    Attributes:
        network: weights to use: the student's, or their average.
        precision: precision of matrix products; None uses the run's.
        precision_key: dotted key that sets the precision; None if there is no such key.
        ends: treatment of a central difference at the ends of [0, 1].
        exact: whether the network is differentiated in forward mode, in place of differences of its calls.
    """

    network: Literal["student", "ema"] = "student"
    precision: Literal["bf16", "fp16", "fp32"] | None = None
    precision_key: str | None = None
    ends: Literal["clamped", "free"] = "clamped"
    exact: bool = False


class StageChanges(Model):
    """One stage of `objective.schedule`.

    steps: number of steps of the stage.
    changes: keys of the objective and of the times, written in full, with their values in this stage.
    """

    steps: PositiveInt
    changes: dict[str, Any]


class ObjectiveConfig(Model):
    """Base class for the keys and facts of an objective, also of a user's own.

    schedule: stages before the run's own keys apply, each with other values of some keys; empty has one stage.
    any_step: True if the student learns u(x, t, r) at r < t; False if it learns only the velocity at r = t.
    branches: True if times.diffusion_share and times.consistency_share split the samples of a step.
    distributions: values of times.distribution that the objective supports.
    unused: (key, other, value) for each key that has no effect while another key of the objective has a value.
    """

    any_step: ClassVar[bool] = True
    branches: ClassVar[bool] = True
    distributions: ClassVar[tuple[str, ...]] = ("uniform",)
    unused: ClassVar[tuple[tuple[str, str, str], ...]] = ()

    kind: str
    schedule: tuple[StageChanges, ...] = ()

    @property
    def follows_teacher(self) -> bool:
        """Whether the objective calls the role `teacher`. The teacher is loaded only if needed."""
        return False

    @property
    def uses_clips(self) -> bool:
        """Whether the objective uses the latents of its batches; otherwise the shards may hold prompts alone."""
        return True

    @property
    def rebalancing(self) -> Rebalancing:
        """Balancing of the losses; none by default."""
        return Rebalancing()

    @property
    def derivative_role(self) -> Derivative | None:
        """Settings of the role `derivative`, for example for a time derivative; None if it is not called."""
        return None

    @property
    def planned(self) -> ObjectiveConfig:
        """Config with about the same costs that a dry run can count."""
        return self

    @property
    def holds_guidance(self) -> bool:
        """Whether the trained student predicts guided velocities, so that samplers add no guidance."""
        return False

    @property
    def held_scale(self) -> float:
        """CFG scale w of the velocities that the trained student predicts: by default the key `guidance_scale`."""
        return getattr(self, "guidance_scale", 1.0) if self.holds_guidance else 1.0

    @property
    def summary(self) -> str:
        """Short description for the model card."""
        return self.kind

    def branch_counts(self, times: Times, global_batch: int) -> BranchCounts | None:
        """Count the samples of each branch in a step; None without branches.

        Raises ValueError if a branch would be empty.
        """
        if not self.branches:
            return None
        return branch_counts(global_batch, times.diffusion_share, times.consistency_share)

    def flow_matching(self) -> FlowMatching:
        """Return flow matching with the same guidance and text dropout, the second term of a causal student."""
        return FlowMatching()

    def findings(self) -> Iterator[Finding]:
        """Yield contradictions among the objective's own keys, named `objective.<key>`."""
        return iter(())


class GuidedObjective(ObjectiveConfig):
    """Keys of the objectives that can learn guided velocities.

    guidance: none; prediction (the network learns guided velocities).
    guidance_scale: CFG scale w = 1 + k; 1 means no guidance.
    text_dropout: share of samples whose text is replaced by the negative prompt.
    guidances: values of `guidance` to suggest to a user who set only the scale.
    """

    guidances: ClassVar[str] = "prediction"

    guidance: str = "none"
    guidance_scale: PositiveFloat = 1.0
    text_dropout: Share = 0.1

    @property
    def holds_guidance(self) -> bool:
        return self.guidance != "none"

    @property
    def summary(self) -> str:
        return f"{self.kind}, guidance {self.guidance} (scale {self.guidance_scale:g})"

    def findings(self) -> Iterator[Finding]:
        """Yield findings if only one of guidance and guidance_scale is set."""
        scale = self.guidance_scale
        if self.guidance == "none" and scale != 1:
            yield Finding(
                ("objective.guidance", "objective.guidance_scale"),
                f"'none' ignores objective.guidance_scale={scale:g}; set objective.guidance to {self.guidances}, "
                "or the scale to 1",
            )
        if self.guidance != "none" and scale <= 1:
            yield Finding(
                ("objective.guidance_scale", "objective.guidance"),
                f"{scale:g} means no guidance (scale w = 1 + k), but objective.guidance={self.guidance}; "
                "set a scale above 1 (the paper uses 3), or objective.guidance=none",
            )


class FlowMatching(GuidedObjective):
    """Stage 0: fine-tune a teacher by flow matching, `||u(x_t, t, t) - (z - x0)||^2`.

    guidance: none; prediction (the network learns guided velocities).
    """

    any_step: ClassVar[bool] = False
    branches: ClassVar[bool] = False
    distributions: ClassVar[tuple[str, ...]] = ("uniform", "logit_normal")

    kind: Literal["flow_matching"] = "flow_matching"
    guidance: Literal["none", "prediction"] = "none"

    def flow_matching(self) -> FlowMatching:
        return self
