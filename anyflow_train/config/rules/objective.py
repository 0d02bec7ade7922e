"""Rules of objectives, times, guidance and the split of a step's batch."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.findings import Finding
from anyflow_train.config.objective import FlowMap, FlowMatching
from anyflow_train.config.positions import branch_counts
from anyflow_train.config.run import RunConfig


def shares(config: RunConfig) -> Iterator[Finding]:
    """Shares of a whole, and a global batch that holds every branch they ask for."""
    times = config.times
    keys = ("times.consistency_share", "times.diffusion_share")
    total = times.diffusion_share + times.consistency_share
    if total > 1 + 1e-9:
        yield Finding(
            keys,
            f"{times.consistency_share} and times.diffusion_share={times.diffusion_share} make {total:g} together; "
            f"at most 1 is possible, so at most {max(0.0, 1 - times.diffusion_share):g} is left here",
        )
        return
    if isinstance(config.objective, FlowMatching):
        yield from _flow_matching_shares(config)
        return
    if times.diffusion_share >= 1:
        yield Finding(
            keys[::-1],
            "1 leaves no sample with r < t, so no flow map is learnt; lower it, or choose objective=flow_matching",
        )
        return
    yield from _branch_sizes(config)


def _flow_matching_shares(config: RunConfig) -> Iterator[Finding]:
    times = config.times
    if times.diffusion_share != 1 or times.consistency_share != 0:
        yield Finding(
            ("times.diffusion_share", "times.consistency_share"),
            f"{times.diffusion_share} with objective.kind=flow_matching, where every sample has r = t; "
            "choose times=flow_matching, or set times.diffusion_share=1 times.consistency_share=0",
        )


def _branch_sizes(config: RunConfig) -> Iterator[Finding]:
    times, size = config.times, config.engine.global_batch
    keys = ("engine.global_batch", "times.diffusion_share", "times.consistency_share")
    try:
        counts = branch_counts(size, times.diffusion_share, times.consistency_share)
    except ValueError as error:
        fitting = next((more for more in range(size + 1, 4097) if _holds_branches(config, more)), None)
        advice = f"; {fitting} is the next size that holds all of them" if fitting else ""
        yield Finding(keys, f"{error}{advice}")
        return
    if isinstance(config.objective, FlowMap) and config.objective.rebalance != "none" and counts.diffusion == 0:
        yield Finding(
            ("objective.rebalance", "times.diffusion_share"),
            f"{config.objective.rebalance!r} scales losses to the diffusion branch, and times.diffusion_share="
            f"{times.diffusion_share} leaves that empty; raise it, or set objective.rebalance=none",
        )


def _holds_branches(config: RunConfig, size: int) -> bool:
    try:
        branch_counts(size, config.times.diffusion_share, config.times.consistency_share)
    except ValueError:
        return False
    return True


def guidance(config: RunConfig) -> Iterator[Finding]:
    """A guidance scale and a way to use it come together."""
    objective = config.objective
    scale = objective.guidance_scale
    if objective.guidance == "none" and scale != 1:
        ways = "prediction or target" if isinstance(objective, FlowMap) else "prediction"
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


def velocity(config: RunConfig) -> Iterator[Finding]:
    """The teacher's velocity needs a teacher."""
    objective = config.objective
    if isinstance(objective, FlowMap) and objective.velocity == "teacher" and config.teacher.source is None:
        yield Finding(
            ("teacher.source", "objective.velocity"),
            "null, but objective.velocity=teacher asks for the teacher's velocity; give a pipeline folder or hub id, "
            "or set objective.velocity=data",
        )


def times_of_flow_map(config: RunConfig) -> Iterator[Finding]:
    """What a flow map needs of its times and its network."""
    if not isinstance(config.objective, FlowMap):
        return
    if config.times.distribution == "logit_normal":
        yield Finding(
            ("times.distribution", "objective.kind"),
            "logit_normal draws t alone, and objective.kind=flow_map needs (t, r); set times.distribution=uniform",
        )
    if config.student.gate_value == 0:
        yield Finding(
            ("student.gate_value", "objective.kind"),
            "0 hides the target time r from the network, so it cannot learn a flow map; set it above 0 "
            "(the paper: 0.25)",
        )
