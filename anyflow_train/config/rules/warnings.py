"""Warnings about settings that are possible but probably not intended."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config import schedule as schedules
from anyflow_train.config.findings import Finding
from anyflow_train.config.keys import show
from anyflow_train.config.positions import even_accumulation, local_positions, rows_with_second_term
from anyflow_train.config.run import RunConfig


def schedule(config: RunConfig) -> Iterator[Finding]:
    """Warn if the run ends before the average, the full learning rate or the first validation starts."""
    steps = config.steps
    for key, first, effect in (
        ("optimizer.ema.start_step", config.optimizer.ema.start_step, "the average stays equal to the weights"),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps, "the full learning rate is never reached"),
    ):
        if first >= steps:
            yield Finding((key,), f"{first} is not below steps={steps}; {effect}")
    if (every := config.evaluation.every) > steps:
        yield Finding(("evaluation.every",), f"{every} is above steps={steps}; there is no validation before the end")


def stages(config: RunConfig) -> Iterator[Finding]:
    """Warn if the run ends before the objective's own keys apply."""
    planned = sum(stage.steps for stage in config.objective.schedule)
    if planned >= config.steps:
        problem = f"its stages take {planned} steps of steps={config.steps}; the objective's own keys are never used"
        yield Finding(("objective.schedule",), problem)


def without_effect(config: RunConfig) -> Iterator[Finding]:
    """Warn about keys that were changed, but that no stage of the run reads."""
    several = [stage.config.objective for stage in schedules.stages(config)]
    for key, switch, off in config.objective.unused:
        default = type(config.objective).model_fields[key].default
        changed = next((value for each in several if (value := getattr(each, key)) != default), None)
        if changed is not None and all(getattr(each, switch) == off for each in several):
            problem = f"{show(changed)} has no effect with objective.{switch}={off}"
            yield Finding((f"objective.{key}", f"objective.{switch}"), problem)


def derivative(config: RunConfig) -> Iterator[Finding]:
    """Warn about a derivative that is less precise than the network, or that takes most of a step's time."""
    settings = config.objective.derivative_role
    if settings is None or settings.precision_key is None:
        return
    key, precision, half = settings.precision_key, settings.precision, config.engine.precision == "bf16"
    if precision != "fp32" and not half:
        problem = f"{precision} makes the derivative less precise than the network with engine.precision=fp32"
        yield Finding((key,), f"{problem}; use fp32")
    if precision == "fp32" and half:
        advice = "fp16 is as fast as bf16 and has an eighth of its error (docs/recipe.md)"
        yield Finding((key,), f"fp32 is many times slower on a GPU than half precision; {advice}")


def validation(config: RunConfig) -> Iterator[Finding]:
    """Warn about validation with other settings than training, or without a best checkpoint."""
    evaluation = config.evaluation
    if evaluation.every == 0:
        return
    if evaluation.held_out is None and evaluation.reference == "clips":
        problem = "null; no distances are measured and no best checkpoint is kept"
        yield Finding(("evaluation.held_out",), f"{problem}; set it, or evaluation.reference=teacher")
    fine, most = evaluation.reference_calls, max(evaluation.calls)
    if evaluation.reference == "teacher" and fine < most:
        problem = f"{fine} is below {most}, the most of evaluation.calls"
        yield Finding(("evaluation.reference_calls",), f"{problem}; the teacher's solution would be the less exact one")
    low, high = sorted((evaluation.shift, config.times.shift))
    # Up to a factor of 2, samples of the embedded student were equally good (docs/recipe.md).
    if high > 2 * low and config.objective.any_step:
        problem = f"{evaluation.shift:g} is far from times.shift={config.times.shift:g}"
        yield Finding(("evaluation.shift",), f"{problem}; validation uses other times than those trained most")
    if config.objective.holds_guidance and (scale := evaluation.guidance_scale) != 1:
        trained = f"a student that is trained with guidance (objective: {config.objective.summary})"
        yield Finding(("evaluation.guidance_scale",), f"{scale:g} adds guidance to {trained}; set it to 1")


def balance(config: RunConfig, world: int) -> Iterator[Finding]:
    """Warn if processes have different numbers of diffusion samples, which costs needless computation."""
    engine = config.engine
    world = world // engine.sequence_parallel
    counts = config.objective.branch_counts(config.times, engine.global_batch)
    if counts is None or config.on_policy.objective_weight == 0 or world == 1:
        return
    local = local_positions(engine.global_batch, engine.micro_batch, world, 0)
    rows = sum(rows_with_second_term(counts, positions, world) * world for positions in local)
    needless = rows - (engine.global_batch - counts.diffusion)
    if needless > 0:
        accumulation = even_accumulation(engine.micro_batch, world, config.times.diffusion_share)
        advice = f"; engine.global_batch={accumulation * engine.micro_batch * world} avoids it" if accumulation else ""
        problem = f"on {world} processes computes the term for r < t {needless} times more often than needed"
        yield Finding(("engine.global_batch",), f"{engine.global_batch} {problem} in each step{advice}")
