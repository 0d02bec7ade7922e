"""Config classes of the objectives that learn a flow map, and the union of all kinds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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
from anyflow_train.config.objective import (
    Derivative,
    FlowMatching,
    GuidedObjective,
    ObjectiveConfig,
    Rebalance,
    Rebalancing,
    Share,
    StageChanges,
    Times,
)
from anyflow_train.config.positions import BranchCounts, branch_counts, split_range


class AverageVelocity(GuidedObjective):
    """Keys of all objectives that learn the average velocity u(x, t, r), which is the velocity at r = t.

    guidance: none; target (the flow map of the guided ODE).
    velocity: teacher (the velocity of the frozen teacher) or data (z - x0; where an objective needs the velocity at
        another point than x_t, it uses the student's own).
    source: points to learn at: data (on the path from clips to noise) or student (noise, and the student's own
        X(z, 1, t)). With student the shards may hold prompts alone.
    noise_share: share of the samples at t = 1 if source is student.
    derivative_network: weights that compute points and targets, without gradient: the student's or their moving
        average.
    weight: loss weight as a function of t: beta08 (published) or uniform.
    rebalance: scale the losses of r < t to the mean loss of r = t: weighted (scales weighted losses, as published),
        unweighted (scales unweighted losses and applies the weight afterwards), sqrt (as unweighted, by the square
        root of the scale), or none.
    rebalance_floor: lower bound of that mean (published: 0). With the teacher's velocity the loss of r = t goes to
        zero; this bound keeps the other losses from vanishing.
    """

    guidances: ClassVar[str] = "target"
    unused: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("noise_share", "source", "data"),
        ("rebalance_floor", "rebalance", "none"),
    )

    guidance: Literal["none", "target"] = "none"
    velocity: Literal["data", "teacher"] = "teacher"
    source: Literal["data", "student"] = "data"
    noise_share: Share = 0.5
    derivative_network: Literal["student", "ema"] = "ema"
    weight: Literal["beta08", "uniform"] = "uniform"
    rebalance: Rebalance = "unweighted"
    rebalance_floor: NonNegativeFloat = 0.05

    @property
    def follows_teacher(self) -> bool:
        return self.velocity == "teacher"

    @property
    def rebalancing(self) -> Rebalancing:
        return Rebalancing(self.rebalance, self.rebalance_floor)

    @property
    def derivative_role(self) -> Derivative:
        return Derivative(self.derivative_network)

    def flow_matching(self) -> FlowMatching:
        guidance = "none" if self.guidance == "none" else "prediction"
        return FlowMatching(guidance=guidance, guidance_scale=self.guidance_scale, text_dropout=self.text_dropout)

    @property
    def uses_clips(self) -> bool:
        return self.source == "data"

    def findings(self) -> Iterator[Finding]:
        yield from super().findings()
        if self.uses_clips:
            return
        if self.velocity == "data":
            yield Finding(
                ("objective.velocity", "objective.source"),
                "'data' needs clips, but objective.source=student has none; set it to teacher",
            )
        if self.weight == "beta08":
            yield Finding(
                ("objective.weight", "objective.source"),
                "'beta08' is 0 at t = 1, so samples that objective.source=student starts from noise would train "
                "nothing; set it to uniform",
            )


class Differentiated(AverageVelocity):
    """Keys of the objectives whose target has a time derivative.

    derivative: difference (of network calls) or jvp (exact, by forward-mode differentiation with the plain attention
        kernel: a slow reference, for one process or DDP, as MeanFlow trains).
    derivative_precision: precision of the network calls for the time derivative.
    epsilon: step of the difference in time; time runs from 0 to 1.
    """

    unused: ClassVar[tuple[tuple[str, str, str], ...]] = (
        *AverageVelocity.unused,
        ("epsilon", "derivative", "jvp"),
    )

    derivative: Literal["difference", "jvp"] = "difference"
    derivative_precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    epsilon: Annotated[float, Field(gt=0, le=0.1)] = 0.005

    @property
    def derivative_role(self) -> Derivative:
        key = "objective.derivative_precision"
        return Derivative(self.derivative_network, self.derivative_precision, key, exact=self.derivative == "jvp")

    @property
    def planned(self) -> ObjectiveConfig:
        def difference(stage: StageChanges) -> StageChanges:
            kept = {key: value for key, value in stage.changes.items() if key != "objective.derivative"}
            return stage.model_copy(update={"changes": kept})

        stages = tuple(difference(stage) for stage in self.schedule)
        return self.model_copy(update={"derivative": "difference", "schedule": stages})


class FlowMap(Differentiated):
    """Stage 1: learn the average velocity by a derivative along the path (Eulerian), on data or from a teacher.

    guidance: none; prediction (the published fusion); target (the flow map of the guided ODE).
    velocity: data (z - x0) or teacher (the velocity of the frozen teacher).
    derivative_ends: clamped keeps t + epsilon in [0, 1] and t - epsilon at or above r; free does not, as published.
    """

    guidances: ClassVar[str] = "prediction or target"

    kind: Literal["flow_map"] = "flow_map"
    guidance: Literal["none", "prediction", "target"] = "none"
    velocity: Literal["data", "teacher"] = "data"
    derivative_ends: Literal["clamped", "free"] = "clamped"
    weight: Literal["beta08", "uniform"] = "beta08"
    rebalance: Rebalance = "weighted"

    @property
    def derivative_role(self) -> Derivative:
        return replace(super().derivative_role, ends=self.derivative_ends)


class Lagrangian(Differentiated):
    """Follow the velocity at the end of each jump, `d_r X(x, t, r) = v(X, r)` (Boffi et al., arXiv 2406.07507)."""

    kind: Literal["lagrangian"] = "lagrangian"


class Semigroup(AverageVelocity):
    """Learn a jump from two shorter jumps, `X(x, t, r) = X(X(x, t, s), s, r)` (shortcut models, arXiv 2410.12557)."""

    kind: Literal["semigroup"] = "semigroup"


class MixShares(Model):
    """Shares of the samples with r < t that learn by each objective; they add up to 1.

    flow_map, lagrangian, semigroup: share of the objective, of the samples with r = 0 and of the free ones alike.
    """

    flow_map: Share = 0.0
    lagrangian: Share = 0.5
    semigroup: Share = 0.5


class MixWeights(Model):
    """Factors of the losses of each objective, after rebalancing.

    flow_map, lagrangian, semigroup: factor of the objective's losses.
    """

    flow_map: PositiveFloat = 1.0
    lagrangian: PositiveFloat = 1.0
    semigroup: PositiveFloat = 1.0


class Mixed(Differentiated):
    """Let several objectives share the samples with r < t."""

    kind: Literal["mixed"] = "mixed"
    shares: MixShares = MixShares()
    weights: MixWeights = MixWeights()

    def positions(self, counts: BranchCounts) -> dict[str, tuple[range, ...]]:
        """List the positions of each objective in the global batch, as ranges.

        Raises ValueError if an objective has a share, but no sample of a branch that is not empty.
        """
        shares = {name: share for name, share in self.shares if share}
        middle = counts.diffusion + counts.consistency
        at_zero = split_range(range(counts.diffusion, middle), list(shares.values()))
        # In reverse order, so that the last objective has one range.
        free = split_range(range(middle, counts.global_batch), list(shares.values())[::-1])[::-1]
        for parts, size, branch in ((at_zero, counts.consistency, "consistency"), (free, counts.free, "free")):
            lost = [name for name, part in zip(shares, parts, strict=True) if size and not part]
            if lost:
                raise ValueError(
                    f"a global batch of {counts.global_batch} has {size} {branch} samples, too few for the share of "
                    f"{' and '.join(lost)} in objective.shares"
                )
        return {name: (zero, rest) for name, zero, rest in zip(shares, at_zero, free, strict=True)}

    def branch_counts(self, times: Times, global_batch: int) -> BranchCounts:
        counts = branch_counts(global_batch, times.diffusion_share, times.consistency_share)
        self.positions(counts)
        return counts

    def findings(self) -> Iterator[Finding]:
        yield from super().findings()
        total = sum(share for _, share in self.shares)
        if abs(total - 1) > 1e-6:
            given = " + ".join(f"{name} {share:g}" for name, share in self.shares)
            yield Finding(("objective.shares",), f"{given} add up to {total:g}; they must add up to 1")
        if self.rebalance == "weighted" and any(weight != 1 for _, weight in self.weights):
            yield Finding(
                ("objective.rebalance", "objective.weights"),
                "'weighted' scales every loss of r < t to the same value, so objective.weights have no effect; set it "
                "to unweighted, sqrt or none",
            )


class SavedObjective(ObjectiveConfig):
    """A user's own objective in a saved config: plain values, read without importing the user's module.

    This is enough to load weights and to compare configs. Training requires the class itself.
    """

    model_config = ConfigDict(extra="allow")


def kind_of(value: Any) -> Any:
    """Return the kind of an objective's config, or of the mapping that it is decoded from."""
    return value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)


def _tag(value: Any) -> str:
    """Return the kind of one of our objectives, or `own` for a user's objective."""
    kind = str(kind_of(value))
    return kind if kind in OURS else "own"


def _saved(value: Any) -> Any:
    """Convert the mapping of a user's own objective; keep an instance unchanged."""
    return SavedObjective.model_validate(value) if isinstance(value, dict) else value


# Kind -> objective class. Plain text, so that decoding a config does not import torch.
OURS = {
    "flow_matching": "anyflow_train.objectives.flow_matching:FlowMatchingObjective",
    "flow_map": "anyflow_train.objectives.flow_map:FlowMapObjective",
    "lagrangian": "anyflow_train.objectives.lagrangian:LagrangianObjective",
    "semigroup": "anyflow_train.objectives.semigroup:SemigroupObjective",
    "mixed": "anyflow_train.objectives.mixed:MixedObjective",
}
# Objectives on a command line. `config.own` adds the config class of a user's own objective.
OurObjective = Annotated[FlowMatching | FlowMap | Lagrangian | Semigroup | Mixed, Field(discriminator="kind")]
# Objectives in a run's config, also in a saved one.
Objective = Annotated[
    Annotated[FlowMatching, Tag("flow_matching")]
    | Annotated[FlowMap, Tag("flow_map")]
    | Annotated[Lagrangian, Tag("lagrangian")]
    | Annotated[Semigroup, Tag("semigroup")]
    | Annotated[Mixed, Tag("mixed")]
    | Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(_saved), Tag("own")],
    Discriminator(_tag),
]
