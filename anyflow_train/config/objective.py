"""Config of the objectives, and of the times at which they are evaluated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from anyflow_train.config.base import Model

Share = Annotated[float, Field(ge=0, le=1)]


class FlowMatching(Model):
    """Stage 0: `||u(x_t, t, t) - (z - x0)||^2` (flow-matching fine-tune of a teacher)."""

    kind: Literal["flow_matching"]
    guidance: Literal["none", "prediction"] = "none"
    guidance_scale: PositiveFloat = 1.0
    text_dropout: Share = 0.1


class FlowMap(Model):
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

    kind: Literal["flow_map"]
    guidance: Literal["none", "prediction", "target"] = "none"
    guidance_scale: PositiveFloat = 1.0
    text_dropout: Share = 0.1
    velocity: Literal["data", "teacher"] = "data"
    derivative_network: Literal["student", "ema"] = "ema"
    derivative_precision: Literal["bf16", "fp16", "fp32"] = "fp32"
    derivative_ends: Literal["clamped", "free"] = "clamped"
    epsilon: Annotated[float, Field(gt=0, le=0.1)] = 0.005
    weight: Literal["beta08", "uniform"] = "beta08"
    rebalance: Literal["weighted", "unweighted", "none"] = "weighted"
    rebalance_floor: NonNegativeFloat = 0.05


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


Objective = Annotated[FlowMatching | FlowMap, Field(discriminator="kind")]
