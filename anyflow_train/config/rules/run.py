"""All rules of a training run, in the order in which their findings are reported."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.findings import Finding
from anyflow_train.config.rules import causal, geometry, objective, on_policy, precision, schedule, warnings
from anyflow_train.config.run import RunConfig
from anyflow_train.config.schedule import stages, without_schedule
from anyflow_train.errors import UserErrors


def run_errors(config: RunConfig, world: int) -> list[Finding]:
    """List the contradictions that prevent a run on `world` processes, in any of its stages."""
    plain = without_schedule(config)
    found = [*_errors(plain, world), *objective.learns_the_map(plain)]
    try:
        several = stages(config)
    except UserErrors as errors:
        return [*found, *(Finding((error.where,), error.problem) for error in errors.errors)]
    for number, stage in enumerate(several):
        own = [*_errors(stage.config, world), *schedule.one_derivative(plain, stage.config)]
        found += [finding.in_stage(number) for finding in own if finding not in found]
    return found


def _errors(config: RunConfig, world: int) -> list[Finding]:
    return [
        *geometry.network_shape(config),
        *geometry.student_start(config),
        *geometry.known_shapes(config),
        *geometry.adapter_targets(config),
        *config.objective.findings(),
        *objective.velocity(config),
        *objective.derivative(config),
        *objective.times(config),
        *objective.shares(config),
        *on_policy.on_policy(config),
        *causal.chunks(config),
        *causal.context(config),
        *precision.frozen(config),
        *precision.fp8(config),
        *schedule.learning_rate(config),
        *geometry.run_sizes(config),
        *_weights(config),
        *schedule.sequence(config, world),
        *schedule.batches(config, world),
        *schedule.validation(config),
    ]


def _weights(config: RunConfig) -> Iterator[Finding]:
    weights, locations = config.data.weights, config.data.locations
    if weights and len(weights) != len(locations):
        problem = f"{list(weights)} for {len(locations)} shards; give one weight for each location in data.shards"
        yield Finding(("data.weights", "data.shards"), problem)
    if len(set(locations)) < len(locations):
        yield Finding(("data.shards",), f"{list(locations)} names a location twice; set data.weights instead")


def run_warnings(config: RunConfig, world: int) -> list[Finding]:
    """List the warnings about a config without errors."""
    return [
        *warnings.schedule(config),
        *warnings.stages(config),
        *objective.unused_shares(config),
        *warnings.without_effect(config),
        *on_policy.warnings(config),
        *precision.warnings(config),
        *warnings.derivative(config),
        *warnings.balance(config, world),
        *warnings.validation(config),
    ]
