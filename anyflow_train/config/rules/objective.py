"""Rules of objectives, times, guidance and the split of a step's batch."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.findings import Finding
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
    if not config.objective.branches:
        return
    if times.diffusion_share >= 1:
        yield Finding(
            keys[::-1],
            "1 leaves no sample with r < t, so no flow map is learnt; lower it, or choose objective=flow_matching",
        )
        return
    yield from _branch_sizes(config)


def unused_shares(config: RunConfig) -> Iterator[Finding]:
    """Shares beside an objective that splits no batch: a warning."""
    times, kind = config.times, config.objective.kind
    if not config.objective.branches and (times.diffusion_share, times.consistency_share) != (1, 0):
        yield Finding(
            ("times.diffusion_share", "times.consistency_share"),
            f"{times.diffusion_share} and times.consistency_share={times.consistency_share} are not used: "
            f"objective.kind={kind} does not split its samples; choose times=flow_matching, which says so",
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
    rebalance = config.objective.rebalancing.mode
    if rebalance != "none" and counts.diffusion == 0:
        yield Finding(
            ("objective.rebalance", "times.diffusion_share"),
            f"{rebalance!r} scales losses to the diffusion branch, and times.diffusion_share="
            f"{times.diffusion_share} leaves that empty; raise it, or set objective.rebalance=none",
        )


def _holds_branches(config: RunConfig, size: int) -> bool:
    try:
        branch_counts(size, config.times.diffusion_share, config.times.consistency_share)
    except ValueError:
        return False
    return True


def own(config: RunConfig) -> Iterator[Finding]:
    """What the objective itself says about its keys."""
    yield from config.objective.findings()


def velocity(config: RunConfig) -> Iterator[Finding]:
    """An objective that follows a teacher needs one."""
    if config.objective.follows_teacher and config.teacher.source is None:
        yield Finding(
            ("teacher.source", "objective.velocity"),
            f"null, but objective.kind={config.objective.kind} calls the teacher here; give a pipeline folder or hub "
            "id (flow_map calls none with objective.velocity=data)",
        )


def times(config: RunConfig) -> Iterator[Finding]:
    """Times that the objective can use, and a network that sees them."""
    objective, distribution = config.objective, config.times.distribution
    if distribution not in objective.distributions:
        drawn = "logit_normal draws t alone, and" if distribution == "logit_normal" else f"{distribution}, but"
        yield Finding(
            ("times.distribution", "objective.kind"),
            f"{drawn} objective.kind={objective.kind} needs (t, r); set times.distribution="
            f"{' or '.join(objective.distributions)}",
        )
    if objective.any_step and config.student.gate_value == 0:
        yield Finding(
            ("student.gate_value", "objective.kind"),
            f"0 hides the target time r from the network, so it cannot learn objective.kind={objective.kind}; set it "
            "above 0 (the paper: 0.25)",
        )
