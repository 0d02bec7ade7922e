"""All rules of a training run, in the order in which their findings are reported."""

from __future__ import annotations

from anyflow_train.config.findings import Finding
from anyflow_train.config.rules import causal, geometry, objective, on_policy, precision, schedule, warnings
from anyflow_train.config.run import RunConfig


def run_errors(config: RunConfig, world: int) -> list[Finding]:
    """List the contradictions that prevent a run on `world` processes."""
    return [
        *geometry.network_shape(config),
        *geometry.student_start(config),
        *geometry.known_shapes(config),
        *geometry.adapter_targets(config),
        *objective.own(config),
        *objective.velocity(config),
        *objective.derivative(config),
        *objective.times(config),
        *objective.shares(config),
        *on_policy.on_policy(config),
        *causal.chunks(config),
        *causal.context(config),
        *precision.fp8(config),
        *schedule.learning_rate(config),
        *geometry.run_sizes(config),
        *schedule.sequence(config, world),
        *schedule.batches(config, world),
        *schedule.validation(config),
    ]


def run_warnings(config: RunConfig, world: int) -> list[Finding]:
    """List the warnings about a config without errors."""
    return [
        *warnings.schedule(config),
        *objective.unused_shares(config),
        *on_policy.warnings(config),
        *precision.warnings(config),
        *warnings.derivative(config),
        *warnings.balance(config, world),
        *warnings.validation(config),
    ]
