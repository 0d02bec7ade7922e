"""Config of the objectives, with the facts that the rest of the package asks of them, and of the drawn times.

An objective's config class holds its keys as fields and its facts as class variables and properties. Everything else
(rules, recipe, dry run, model card) reads the facts, never the class, so a new objective is one config class and one
objective class. A user's own objective has its config class beside it: see docs/extend.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    SerializeAsAny,
    Tag,
)

from anyflow_train.config.base import Model
from anyflow_train.config.findings import Finding
from anyflow_train.config.positions import BranchCounts, branch_counts

Share = Annotated[float, Field(ge=0, le=1)]
Rebalance = Literal["weighted", "unweighted", "none"]


class Times(Model):
    """How (t, r) are drawn. Shares are of the global batch; what is left stays free (0 <= r <= t).

    distribution: uniform (two uniforms, t the larger) or logit_normal (t only, for flow matching).
    precision: bf16 rounds the drawn times as the published code does.
    """

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    shift: PositiveFloat = 5.0
    diffusion_share: Share = 0.5
    consistency_share: Share = 0.25
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True)
class Rebalancing:
    """How losses at r < t are scaled to the diffusion samples' mean loss, and what that counts as at least."""

    mode: Rebalance = "none"
    floor: float = 0.0


@dataclass(frozen=True)
class Derivative:
    """How an objective calls the role `derivative`, which has no gradient.

    Attributes:
        network: the weights: the student's, or their average.
        precision: of its products; None for that of the run.
        precision_key: the dotted key that sets the precision; None for an objective without one.
        ends: how a central difference ends at the borders of [0, 1].
    """

    network: Literal["student", "ema"] = "student"
    precision: Literal["bf16", "fp16", "fp32"] | None = None
    precision_key: str | None = None
    ends: Literal["clamped", "free"] = "clamped"


class ObjectiveConfig(Model):
    """Keys and facts of an objective: the base of ours, and of a user's own.

    any_step: the student learns u(x, t, r) at r < t, so it has to see r. False: only the velocity at r = t.
    branches: a step's samples are split by times.diffusion_share and times.consistency_share.
    distributions: values of times.distribution that it can use.
    """

    any_step: ClassVar[bool] = True
    branches: ClassVar[bool] = True
    distributions: ClassVar[tuple[str, ...]] = ("uniform",)

    kind: str

    @property
    def follows_teacher(self) -> bool:
        """Whether it calls the role `teacher`, which is loaded only where something does."""
        return False

    @property
    def rebalancing(self) -> Rebalancing:
        """How its losses are balanced; by default they are not."""
        return Rebalancing()

    @property
    def derivative(self) -> Derivative | None:
        """How the role `derivative` is called, such as for a time derivative; None for an objective that does not."""
        return None

    @property
    def holds_guidance(self) -> bool:
        """Whether the trained student already gives guided velocities, so that samplers add no guidance."""
        return False

    @property
    def summary(self) -> str:
        """A few words for the model card."""
        return self.kind

    def branch_counts(self, times: Times, global_batch: int) -> BranchCounts | None:
        """Samples of each branch in a step; None without branches. ValueError: one of them would be empty."""
        if not self.branches:
            return None
        return branch_counts(global_batch, times.diffusion_share, times.consistency_share)

    def flow_matching(self) -> FlowMatching:
        """Flow matching with this objective's guidance and text dropout: a causal student's second term."""
        return FlowMatching()

    def findings(self) -> Iterator[Finding]:
        """Contradictions among its own keys; give them as `objective.<key>`."""
        return iter(())


class FlowMatching(ObjectiveConfig):
    """Stage 0: `||u(x_t, t, t) - (z - x0)||^2` (flow-matching fine-tune of a teacher)."""

    any_step: ClassVar[bool] = False
    branches: ClassVar[bool] = False
    distributions: ClassVar[tuple[str, ...]] = ("uniform", "logit_normal")

    kind: Literal["flow_matching"] = "flow_matching"
    guidance: Literal["none", "prediction"] = "none"
    guidance_scale: PositiveFloat = 1.0
    text_dropout: Share = 0.1

    @property
    def holds_guidance(self) -> bool:
        return self.guidance != "none"

    @property
    def summary(self) -> str:
        return _with_guidance(self)

    def flow_matching(self) -> FlowMatching:
        return self

    def findings(self) -> Iterator[Finding]:
        return _guidance_findings(self, "prediction")


class FlowMap(ObjectiveConfig):
    """Stage 1: the average velocity on data, by a central difference in time.

    guidance: none; prediction (the published fusion); target (the flow map of the guided ODE).
    guidance_scale: CFG scale w = 1 + k, everywhere.
    velocity: data (z - x0) or the frozen teacher's.
    derivative_network, derivative_precision, epsilon, derivative_ends: how the time derivative is taken;
        `derivative_ends=free` lets t + e leave [0, 1] and t - e pass r, as published.
    rebalance: scale non-diffusion losses to the diffusion mean; on the weighted losses (published), on the unweighted
        losses with the weight applied after, or not at all.
    rebalance_floor: what the diffusion mean counts as at least (0 as published). With the teacher's velocity, whose
        diffusion loss goes to nothing, it is what keeps the others.
    """

    kind: Literal["flow_map"] = "flow_map"
    guidance: Literal["none", "prediction", "target"] = "none"
    guidance_scale: PositiveFloat = 1.0
    text_dropout: Share = 0.1
    velocity: Literal["data", "teacher"] = "data"
    derivative_network: Literal["student", "ema"] = "ema"
    derivative_precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    derivative_ends: Literal["clamped", "free"] = "clamped"
    epsilon: Annotated[float, Field(gt=0, le=0.1)] = 0.005
    weight: Literal["beta08", "uniform"] = "beta08"
    rebalance: Rebalance = "weighted"
    rebalance_floor: NonNegativeFloat = 0.05

    @property
    def follows_teacher(self) -> bool:
        return self.velocity == "teacher"

    @property
    def rebalancing(self) -> Rebalancing:
        return Rebalancing(self.rebalance, self.rebalance_floor)

    @property
    def derivative(self) -> Derivative:
        key = "objective.derivative_precision"
        return Derivative(self.derivative_network, self.derivative_precision, key, self.derivative_ends)

    @property
    def holds_guidance(self) -> bool:
        return self.guidance != "none"

    @property
    def summary(self) -> str:
        return _with_guidance(self)

    def flow_matching(self) -> FlowMatching:
        guidance = "none" if self.guidance == "none" else "prediction"
        return FlowMatching(guidance=guidance, guidance_scale=self.guidance_scale, text_dropout=self.text_dropout)

    def findings(self) -> Iterator[Finding]:
        return _guidance_findings(self, "prediction or target")


class SavedObjective(ObjectiveConfig):
    """A user's own objective as a run, checkpoint or export names it: plain values, nothing is imported for them.

    Enough for loading weights, and for comparing a config with a saved one. Training needs the class itself.
    """

    model_config = ConfigDict(extra="allow")


def _with_guidance(objective: FlowMatching | FlowMap) -> str:
    return f"{objective.kind}, guidance {objective.guidance} (scale {objective.guidance_scale:g})"


def _guidance_findings(objective: FlowMatching | FlowMap, ways: str) -> Iterator[Finding]:
    """A guidance scale and a way to use it come together."""
    scale = objective.guidance_scale
    if objective.guidance == "none" and scale != 1:
        yield Finding(
            ("objective.guidance", "objective.guidance_scale"),
            f"none makes objective.guidance_scale={scale:g} useless; set objective.guidance to {ways}, "
            "or the scale to 1",
        )
    if objective.guidance != "none" and scale <= 1:
        yield Finding(
            ("objective.guidance_scale", "objective.guidance"),
            f"{scale:g} is no guidance (scale w = 1 + k), but objective.guidance={objective.guidance}; "
            "set a scale above 1 (the paper: 3), or objective.guidance=none",
        )


def _tag(value: Any) -> str:
    """Our kinds by name; any other is a user's own."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return str(kind) if kind in OURS else "own"


def _saved(value: Any) -> Any:
    """A mapping that names a user's own objective; an instance stays what it is."""
    return SavedObjective.model_validate(value) if isinstance(value, dict) else value


# Kind -> the class that makes the losses. Plain text, so that decoding a config imports no torch.
OURS = {
    "flow_matching": "anyflow_train.objectives.flow_matching:FlowMatchingObjective",
    "flow_map": "anyflow_train.objectives.flow_map:FlowMapObjective",
}
# What a command line may write, unless it names a user's own class, whose config then stands here (`config.own`).
OurObjective = Annotated[FlowMatching | FlowMap, Field(discriminator="kind")]
# What a run may hold.
Objective = Annotated[
    Annotated[FlowMatching, Tag("flow_matching")]
    | Annotated[FlowMap, Tag("flow_map")]
    | Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(_saved), Tag("own")],
    Discriminator(_tag),
]
