"""Rules for objectives, times, guidance and the branches of a global batch."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.findings import Finding
from anyflow_train.config.keys import show
from anyflow_train.config.run import RunConfig


def shares(config: RunConfig) -> Iterator[Finding]:
    """Check that the shares add up to at most 1, and that the global batch has samples for every branch."""
    times, objective, size = config.times, config.objective, config.engine.global_batch
    keys = ("times.consistency_share", "times.diffusion_share")
    total = times.diffusion_share + times.consistency_share
    if total > 1 + 1e-9:
        problem = f"{times.consistency_share} and times.diffusion_share={times.diffusion_share} add up to {total:g}"
        most = max(0.0, 1 - times.diffusion_share)
        yield Finding(keys, f"{problem}, but at most 1 is possible; set it to {most:g} or less")
        return
    if not objective.branches:
        return
    if problem := _lost_branch(config, size):
        fitting = next((more for more in range(size + 1, 4097) if not _lost_branch(config, more)), None)
        advice = f"; the next possible size is {fitting}" if fitting else ""
        yield Finding(("engine.global_batch", *keys), f"{problem}{advice}")
        return
    counts, rebalance = objective.branch_counts(times, size), objective.rebalancing.mode
    if rebalance != "none" and counts is not None and counts.diffusion == 0:
        empty = f"which is empty with times.diffusion_share={times.diffusion_share}"
        problem = f"{rebalance!r} scales losses to the diffusion branch, {empty}"
        advice = "raise the share, or set objective.rebalance=none"
        yield Finding(("objective.rebalance", "times.diffusion_share"), f"{problem}; {advice}")


def learns_the_map(config: RunConfig) -> Iterator[Finding]:
    """Check that there are samples with r < t. Only stages of a schedule may do without them."""
    if config.objective.branches and config.times.diffusion_share >= 1:
        problem = "1 leaves no samples with r < t for the flow map; lower it, or choose objective=flow_matching"
        yield Finding(("times.diffusion_share", "times.consistency_share"), problem)


def _lost_branch(config: RunConfig, size: int) -> str | None:
    """Return why a global batch is too small for every branch; None if it is not."""
    try:
        config.objective.branch_counts(config.times, size)
    except ValueError as error:
        return str(error)


def unused_shares(config: RunConfig) -> Iterator[Finding]:
    """Warn about shares with an objective that does not split the batch."""
    times, kind = config.times, config.objective.kind
    if not config.objective.branches and (times.diffusion_share, times.consistency_share) != (1, 0):
        problem = f"{times.diffusion_share} and times.consistency_share={times.consistency_share} have no effect"
        reason = f"objective.kind={kind} does not split its samples; choose times=flow_matching"
        yield Finding(("times.diffusion_share", "times.consistency_share"), f"{problem}: {reason}")


def velocity(config: RunConfig) -> Iterator[Finding]:
    """Check that there is a teacher if the objective calls it."""
    if config.objective.follows_teacher and config.teacher.source is None:
        problem = f"null, but objective.kind={config.objective.kind} calls the teacher"
        advice = "give a pipeline folder or hub id (flow_map needs no teacher with objective.velocity=data)"
        yield Finding(("teacher.source", "objective.velocity"), f"{problem}; {advice}")


def derivative(config: RunConfig) -> Iterator[Finding]:
    """Check that nothing prevents the forward-mode differentiation of the network."""
    role, engine = config.objective.derivative_role, config.engine
    if role is None or not role.exact:
        return
    for name, value, allowed in (
        ("compile", engine.compile, False),
        ("sequence_parallel", engine.sequence_parallel, 1),
        ("fp8", engine.fp8, "none"),
    ):
        if value != allowed:
            yield Finding(
                ("objective.derivative", f"engine.{name}"),
                f"'jvp' cannot be computed with engine.{name}={show(value)}; set that to {show(allowed)}, or "
                "objective.derivative to difference",
            )


def times(config: RunConfig) -> Iterator[Finding]:
    """Check that the objective supports the distribution of times, and that the network sees r if it needs it."""
    objective, distribution = config.objective, config.times.distribution
    if distribution not in objective.distributions:
        drawn = "logit_normal draws only t, but" if distribution == "logit_normal" else f"{distribution}, but"
        advice = f"set times.distribution={' or '.join(objective.distributions)}"
        problem = f"{drawn} objective.kind={objective.kind} needs (t, r)"
        yield Finding(("times.distribution", "objective.kind"), f"{problem}; {advice}")
    if objective.any_step and config.student.gate_value == 0:
        problem = f"0 hides the target time r from the network, so it cannot learn objective.kind={objective.kind}"
        keys = ("student.gate_value", "objective.kind")
        yield Finding(keys, f"{problem}; set it above 0 (the paper uses 0.25)")
