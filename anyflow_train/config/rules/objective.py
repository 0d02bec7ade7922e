"""Rules for objectives, times, guidance and the branches of a global batch."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.findings import Finding
from anyflow_train.config.keys import show
from anyflow_train.config.run import RunConfig


def shares(config: RunConfig) -> Iterator[Finding]:
    """Check that the shares add up to at most 1, and that the global batch has samples for every branch."""
    times = config.times
    keys = ("times.consistency_share", "times.diffusion_share")
    total = times.diffusion_share + times.consistency_share
    if total > 1 + 1e-9:
        yield Finding(
            keys,
            f"{times.consistency_share} and times.diffusion_share={times.diffusion_share} add up to {total:g}, but at "
            f"most 1 is possible; set it to {max(0.0, 1 - times.diffusion_share):g} or less",
        )
        return
    if not config.objective.branches:
        return
    if times.diffusion_share >= 1:
        yield Finding(
            keys[::-1],
            "1 leaves no samples with r < t for the flow map; lower it, or choose objective=flow_matching",
        )
        return
    yield from _branch_sizes(config)


def unused_shares(config: RunConfig) -> Iterator[Finding]:
    """Warn about shares with an objective that does not split the batch."""
    times, kind = config.times, config.objective.kind
    if not config.objective.branches and (times.diffusion_share, times.consistency_share) != (1, 0):
        yield Finding(
            ("times.diffusion_share", "times.consistency_share"),
            f"{times.diffusion_share} and times.consistency_share={times.consistency_share} have no effect: "
            f"objective.kind={kind} does not split its samples; choose times=flow_matching",
        )


def _branch_sizes(config: RunConfig) -> Iterator[Finding]:
    times, size = config.times, config.engine.global_batch
    keys = ("engine.global_batch", "times.diffusion_share", "times.consistency_share")
    try:
        counts = config.objective.branch_counts(times, size)
    except ValueError as error:
        fitting = next((more for more in range(size + 1, 4097) if _holds_branches(config, more)), None)
        advice = f"; the next possible size is {fitting}" if fitting else ""
        yield Finding(keys, f"{error}{advice}")
        return
    rebalance = config.objective.rebalancing.mode
    if rebalance != "none" and counts is not None and counts.diffusion == 0:
        yield Finding(
            ("objective.rebalance", "times.diffusion_share"),
            f"{rebalance!r} scales losses to the diffusion branch, which is empty with times.diffusion_share="
            f"{times.diffusion_share}; raise the share, or set objective.rebalance=none",
        )


def _holds_branches(config: RunConfig, size: int) -> bool:
    try:
        config.objective.branch_counts(config.times, size)
    except ValueError:
        return False
    return True


def own(config: RunConfig) -> Iterator[Finding]:
    """Yield the findings of the objective about its own keys."""
    yield from config.objective.findings()


def velocity(config: RunConfig) -> Iterator[Finding]:
    """Check that there is a teacher if the objective calls it."""
    if config.objective.follows_teacher and config.teacher.source is None:
        yield Finding(
            ("teacher.source", "objective.velocity"),
            f"null, but objective.kind={config.objective.kind} calls the teacher; give a pipeline folder or hub id "
            "(flow_map needs no teacher with objective.velocity=data)",
        )


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
        yield Finding(
            ("times.distribution", "objective.kind"),
            f"{drawn} objective.kind={objective.kind} needs (t, r); set times.distribution="
            f"{' or '.join(objective.distributions)}",
        )
    if objective.any_step and config.student.gate_value == 0:
        yield Finding(
            ("student.gate_value", "objective.kind"),
            f"0 hides the target time r from the network, so it cannot learn objective.kind={objective.kind}; set it "
            "above 0 (the paper uses 0.25)",
        )
