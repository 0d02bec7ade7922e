"""Writes a plan as text."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from anyflow_train.config.commands import PlanOptions
from anyflow_train.config.derived import table
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.dry_run import DryRun
from anyflow_train.plan.fit import Setting
from anyflow_train.plan.memory import Memory
from anyflow_train.plan.meter import BACKWARD
from anyflow_train.plan.validation import STUDENT, TEACHER, compared_samples
from anyflow_train.text import GIB, memory_size
from anyflow_train.training.gpus import GPUS, TERA, step_seconds

HOUR, MINUTE = 3600, 60
# Smallest share of a step's operations that gets a row: the embedders of times are always in float32.
SHOWN = 0.001


def report(config: RunConfig, options: PlanOptions, found: DryRun, memory: Memory) -> str:
    """Write the plan of a run: its sizes, operations, memory, time and cost."""
    gpu = GPUS[options.gpu]
    lines = [f"{config.name} on {options.world} x {gpu.title}, strategy {options.strategy}: predicted, not measured"]
    lines += ["", *_run(config, options, found)]
    if len(found.stages) > 1:
        number = found.stages.index(found.work)
        lines.append(_row("planned", f"stage {number + 1}", f"the dearest of {len(found.stages)} stages"))
    lines += ["", "Operations of a step (of all GPUs together)", *_operations(found)]
    lines += ["", "Memory of one GPU, when it is fullest", *_memory(memory, gpu.memory, options.gpus)]
    lines += ["", "Time and cost", *_time(config, options, found)]
    return "\n".join(lines)


def advice(found: tuple[Setting, Memory] | None, options: PlanOptions) -> str:
    """Say what to change so that a run fits that does not.

    Args:
        found: the nearest setting that fits and its memory, if there is one.
    """
    have = GPUS[options.gpu].memory
    if found is None:
        return f"It does not fit, nor does any setting with {have:g} GiB; more or larger GPUs are needed."
    setting, memory = found
    changes = " ".join(setting.changes)
    needs = f"{memory.total / GIB:.1f} of {have:g} GiB"
    if memory.host:
        needs += f", and {memory.host / GIB * options.gpus:.0f} GiB of the host's memory on each node"
    return f"It does not fit. The nearest setting that does ({needs}): {changes}"


def _run(config: RunConfig, options: PlanOptions, found: DryRun) -> Iterator[str]:
    for name, value in table(config, options.world):
        yield _row(name, value)
    for role, sizes in found.sizes.items():
        own = sizes.trained + sizes.not_trained
        if role == "student":
            yield _row("parameters", f"{sizes.parameters:,}")
            yield _row("trainable", f"{sizes.trained:,}", f"{sizes.trained / sizes.parameters:.1%} of the student's")
        elif (own == sizes.trained and sizes.adapters) or not own:
            base = found.sizes["student"].parameters
            adapter = f", and {sizes.trained:,} of its own" if sizes.trained else ""
            yield _row(role, f"{base:,}", f"parameters: the student's frozen base{adapter}")
        else:
            state = "trained" if sizes.trained else "frozen"
            assumed = "; taken to be as large as the student, its config is not here"
            note = assumed if role in found.assumed else ""
            yield _row(role, f"{sizes.parameters:,}", f"parameters, {state}{note}")


def _operations(found: DryRun) -> Iterator[str]:
    """Yield a row for each part and precision. What checkpointing repeats in a backward pass has a row of its own."""
    rows: dict[tuple[str, bool], float] = {}
    for work, count in found.operations.items():
        name = f"{work.part}, recomputed" if work.repeated else work.part
        rows[name, work.dtype == torch.float32] = rows.get((name, work.dtype == torch.float32), 0) + count
    whole = sum(rows.values())
    for (name, wide), count in rows.items():
        if count / whole < SHOWN:
            continue
        part = name.removesuffix(", recomputed")
        role = part.removesuffix(BACKWARD)
        samples = found.samples.get(f"{role}, forward" if part.endswith(BACKWARD) else part, 0)
        note = ", in float32" if wide else ""
        yield _row(name, _flop(count), f"{count / whole:4.0%}", f"{round(samples, 1):g} samples{note}")
    share = found.work / whole
    yield _row("all", _flop(whole), "100%", f"{share:.0%} of it is work, the rest is computed again by checkpointing")


def _memory(memory: Memory, have: float, gpus: int) -> Iterator[str]:
    for name, size in memory.parts:
        yield _row(name, memory_size(size))
    fits = "fits" if memory.total <= have * GIB else "does not fit"
    yield _row("all", memory_size(memory.total), f"of {have:g} GiB: {fits}")
    if memory.host:
        yield _row("in the host's memory, all GPUs of a node", memory_size(memory.host * gpus))


def _time(config: RunConfig, options: PlanOptions, found: DryRun) -> Iterator[str]:
    gpu = GPUS[options.gpu]
    by_precision = step_seconds(found.by_precision, gpu, options.world, options.utilisation)
    seconds = sum(by_precision.values())
    peak = f"{options.utilisation:.0%} of {gpu.bf16:g} TFLOP/s (bfloat16) and {gpu.fp32:g} (float32)"
    yield _row("a step", _seconds(seconds), f"at {peak}")
    wide = by_precision["float32"]
    if wide / seconds > SHOWN and config.engine.precision == "bf16":
        yield _row("of it in float32", _seconds(wide), f"{wide / seconds:.0%}: objective.derivative_precision")
    hours = config.steps * seconds / HOUR
    gpu_hours = hours * options.world
    whole = f"{hours:,.1f} h" if hours >= 1 else f"{hours * HOUR / MINUTE:.1f} min"
    yield _row(f"{config.steps:,} steps", whole, f"{gpu_hours:,.0f} GPU-hours, without validation")
    for name, sampling in _validation(config, options, found):
        yield _row(name, f"{sampling / MINUTE:,.1f} min", "without decoding")
    if options.price is not None:
        yield _row("cost", f"{gpu_hours * options.price:,.0f}", f"at {options.price:g} for a GPU-hour")


def _validation(config: RunConfig, options: PlanOptions, found: DryRun) -> Iterator[tuple[str, float]]:
    """Yield the name and seconds of what validation samples. The processes share the batches."""
    evaluation, gpu = config.evaluation, GPUS[options.gpu]
    width = config.engine.sequence_parallel
    peak = gpu.bf16 if config.engine.precision == "bf16" else gpu.fp32
    speed = TERA * peak * options.utilisation * width

    def samples(count: int) -> int:
        """Number of samples that one process makes, of `count` of all processes."""
        return math.ceil(math.ceil(count / evaluation.batch) / (options.world // width)) * evaluation.batch

    if STUDENT in found.calls:
        made = samples(compared_samples(config)) + samples(evaluation.videos)
        yield "a validation", made * sum(evaluation.calls) * found.calls[STUDENT] / speed
    if TEACHER in found.calls:
        made = samples(evaluation.samples) * evaluation.reference_calls
        yield "teacher's reference, once", made * found.calls[TEACHER] / speed


def _row(name: str, value: str, *notes: str) -> str:
    return f"  {name:<42}{value:>14}  {'  '.join(notes)}".rstrip()


def _flop(count: float) -> str:
    return f"{count / TERA:,.1f} TFLOP" if count >= TERA else f"{1000 * count / TERA:,.1f} GFLOP"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"
