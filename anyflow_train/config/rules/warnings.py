"""What is possible but probably not meant: said on the terminal, never an error."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.findings import Finding
from anyflow_train.config.positions import even_accumulation, local_positions, rows_with_second_term
from anyflow_train.config.run import RunConfig


def schedule(config: RunConfig) -> Iterator[Finding]:
    """Steps at which something starts, after the run's end."""
    steps = config.steps
    if config.optimizer.ema.start_step >= steps:
        yield Finding(
            ("optimizer.ema.start_step",),
            f"{config.optimizer.ema.start_step} is not below steps={steps}: the average stays a plain copy "
            "of the weights",
        )
    if config.optimizer.warmup_steps >= steps:
        yield Finding(
            ("optimizer.warmup_steps",),
            f"{config.optimizer.warmup_steps} is not below steps={steps}: the full learning rate is never reached",
        )
    if config.evaluation.every > steps:
        yield Finding(
            ("evaluation.every",), f"{config.evaluation.every} is above steps={steps}: no validation on the way"
        )


def derivative(config: RunConfig) -> Iterator[Finding]:
    """A derivative that is less precise than the network, or takes most of a step."""
    settings = config.objective.derivative
    if settings is None or settings.precision_key is None:
        return
    key, precision, half = settings.precision_key, settings.precision, config.engine.precision == "bf16"
    if precision != "fp32" and not half:
        yield Finding(
            (key,),
            f"{precision} rounds the derivative of a network that runs in engine.precision=fp32: pointless, except to "
            "see what it costs; fp32 is better",
        )
    if precision == "fp32" and half:
        yield Finding(
            (key,),
            "fp32 is many times slower on a GPU than half precision; fp16 is as fast as bf16 and its derivative an "
            "eighth as far off (docs/recipe.md)",
        )


def validation(config: RunConfig) -> Iterator[Finding]:
    """Validation that samples otherwise than the student was trained, or keeps no best checkpoint."""
    evaluation = config.evaluation
    if evaluation.every == 0:
        return
    if evaluation.held_out is None:
        yield Finding(("evaluation.held_out",), "null: no distances are measured, so no best checkpoint is kept")
    if evaluation.shift != config.times.shift and config.objective.any_step:
        yield Finding(
            ("evaluation.shift",),
            f"{evaluation.shift:g} differs from times.shift={config.times.shift:g}: "
            "the sampled steps are not those trained most",
        )
    if config.objective.holds_guidance and evaluation.guidance_scale != 1:
        yield Finding(
            ("evaluation.guidance_scale",),
            f"{evaluation.guidance_scale:g} guides a student that already holds guidance "
            f"(objective: {config.objective.summary}); 1 samples it as trained",
        )


def balance(config: RunConfig, world: int) -> Iterator[Finding]:
    """Micro-steps in which processes hold different numbers of diffusion samples: all of them run the differences."""
    engine = config.engine
    world = world // engine.sequence_parallel
    counts = config.objective.branch_counts(config.times, engine.global_batch)
    if counts is None or config.on_policy.objective_weight == 0 or world == 1:
        return
    rows = [
        rows_with_second_term(counts, positions, world) * world
        for positions in local_positions(engine.global_batch, engine.micro_batch, world, 0)
    ]
    needless = sum(rows) - (engine.global_batch - counts.diffusion)
    accumulation = even_accumulation(engine.micro_batch, world, config.times.diffusion_share)
    if needless > 0:
        advice = f"; engine.global_batch={accumulation * engine.micro_batch * world} avoids it" if accumulation else ""
        yield Finding(
            ("engine.global_batch",),
            f"{engine.global_batch} on {world} processes computes the term of r < t {needless} times too often per "
            f"step{advice}",
        )
