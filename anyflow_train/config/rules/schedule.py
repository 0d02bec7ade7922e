"""Rules for batches, the learning-rate schedule, and validation during a run."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.findings import Finding
from anyflow_train.config.run import Evaluation, RunConfig
from anyflow_train.text import nearest

# Metrics of validation at each step count, by `evaluation.reference`; lower is better.
DISTANCES = {"clips": ("energy_distance", "sliced_wasserstein"), "teacher": ("energy_distance", "rms")}
ORACLE_METRICS = ("class_error",)


def sequence(config: RunConfig, world: int) -> Iterator[Finding]:
    """Check that sequence_parallel divides the processes and the attention heads."""
    key, width = "engine.sequence_parallel", config.engine.sequence_parallel
    if world % width:
        yield Finding((key,), f"{width} does not divide the number of processes, {world}")
    heads = config.student.architecture.num_attention_heads
    if heads % width:
        problem = f"{width} does not divide the number of attention heads, {heads}"
        yield Finding((key, "student.architecture.num_attention_heads"), problem)


def batches(config: RunConfig, world: int) -> Iterator[Finding]:
    """Check that the global batch is whole micro-batches on every process or sequence-parallel group."""
    engine = config.engine
    world = max(world // engine.sequence_parallel, 1)
    width = engine.micro_batch * world
    if engine.global_batch % width == 0:
        return
    lower = engine.global_batch // width * width
    nearest = f"{lower} and {lower + width}" if lower else f"{width}"
    product = f"engine.micro_batch={engine.micro_batch} x {world} process{'es' * (world > 1)} = {width}"
    problem = f"{engine.global_batch} is not a multiple of {product}; nearest are {nearest}"
    parts = engine.global_batch // engine.micro_batch
    if world > 1 and parts * engine.micro_batch == engine.global_batch:
        fewer = max(count for count in range(1, world) if parts % count == 0) * engine.sequence_parallel
        problem += f"; or start {fewer} process{'es' * (fewer > 1)} (anyflow plan: gpus={fewer})"
    yield Finding(("engine.global_batch", "engine.micro_batch"), problem)


def learning_rate(config: RunConfig) -> Iterator[Finding]:
    """Check for options of a schedule that is not the chosen one."""
    optimizer = config.optimizer
    if optimizer.schedule == "constant" and optimizer.final_lr_share != 0:
        problem = f"{optimizer.final_lr_share:g} has no effect with optimizer.schedule=constant"
        keys = ("optimizer.final_lr_share", "optimizer.schedule")
        yield Finding(keys, f"{problem}; set it to 0, or the schedule to cosine")


def one_derivative(config: RunConfig, stage: RunConfig) -> Iterator[Finding]:
    """Check that a stage takes derivatives of the same weights in the same precision as the run: one role has them."""
    wanted, found = config.objective.derivative_role, stage.objective.derivative_role
    if found is not None and (wanted is None or (found.network, found.precision) != (wanted.network, wanted.precision)):
        problem = f"a stage cannot change the weights ({found.network}) or precision ({found.precision})"
        yield Finding(("objective.derivative",), f"{problem} that the derivative is taken of")


def validation(config: RunConfig) -> Iterator[Finding]:
    """Check that validation has what its metrics require."""
    evaluation = config.evaluation
    if evaluation.every == 0:
        return
    for key, value, off in (("oracle", evaluation.oracle, "none"), ("videos", evaluation.videos, 0)):
        if value != off and config.teacher.codec_source is None:
            problem = f"null, but evaluation.{key}={value} decodes videos"
            advice = f"give a pipeline folder or hub id with the VAE, or set evaluation.{key}={off}"
            yield Finding(("teacher.codec", f"evaluation.{key}"), f"{problem}; {advice}")
    if evaluation.reference == "teacher":
        yield from _teacher_reference(config)
    if evaluation.held_out is not None or evaluation.reference == "teacher":
        yield from _best_metric(evaluation)


def _teacher_reference(config: RunConfig) -> Iterator[Finding]:
    if config.teacher.source is None:
        problem = "null, but evaluation.reference=teacher compares samples with a teacher"
        advice = "give a pipeline folder or hub id, or set evaluation.reference=clips"
        yield Finding(("teacher.source", "evaluation.reference"), f"{problem}; {advice}")
    for key in ("samples", "reference_videos"):
        if getattr(config.evaluation, key) == 1:
            yield Finding((f"evaluation.{key}",), "1, but a comparison with the teacher needs 2 or more")


def _best_metric(evaluation: Evaluation) -> Iterator[Finding]:
    metrics = DISTANCES[evaluation.reference] + (ORACLE_METRICS if evaluation.oracle != "none" else ())
    valid = [f"{metric}_{calls}" for metric in metrics for calls in evaluation.calls]
    if evaluation.best_metric in valid:
        return
    problem = f"{evaluation.best_metric!r} is not measured; nearest is {nearest(evaluation.best_metric, valid, 0.0)!r}"
    possible = f"metrics {', '.join(metrics)}, each at evaluation.calls={list(evaluation.calls)}"
    keys = ("evaluation.best_metric", "evaluation.calls", "evaluation.oracle")
    yield Finding(keys, f"{problem} ({possible})")
