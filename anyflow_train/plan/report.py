"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator

from anyflow_train.config.commands import PlanOptions
from anyflow_train.config.derived import derive, table
from anyflow_train.config.network import FullTraining
from anyflow_train.config.objective import FlowMap
from anyflow_train.config.parameters import count_parameters
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.fit import Setting
from anyflow_train.plan.gpus import GPUS
from anyflow_train.plan.memory import GIB, Memory
from anyflow_train.plan.networks import Network, run_networks
from anyflow_train.plan.parts import Part
from anyflow_train.plan.work import TERA, step_parts, step_seconds

HOUR = 3600


def report(config: RunConfig, options: PlanOptions, memory: Memory) -> str:
    """Everything but the advice on what would fit."""
    gpu = GPUS[options.gpu]
    parts = step_parts(config, options.world)
    lines = [f"{config.name} on {options.world} x {gpu.title}, engine {options.engine}: predicted, not measured"]
    lines += ["", *_run(config, options)]
    lines += ["", "Operations of a step (of all GPUs together)", *_operations(parts)]
    lines += ["", "Memory of one GPU, when it is fullest", *_memory(memory, gpu.memory, options.gpus)]
    lines += ["", "Time and cost", *_time(config, options, parts)]
    return "\n".join(lines)


def advice(found: tuple[Setting, Memory] | None, options: PlanOptions) -> str:
    """What to change so that the run fits."""
    have = GPUS[options.gpu].memory
    if found is None:
        return f"It does not fit, nor does any setting with {have:g} GiB; more or larger GPUs are needed."
    setting, memory = found
    changes = " ".join(setting.changes)
    needs = f"{memory.total / GIB:.1f} of {have:g} GiB"
    if memory.host:
        needs += f", and {memory.host / GIB * options.gpus:.0f} GiB of the host's memory on each node"
    return f"It does not fit. The nearest setting that does ({needs}): {changes}"


def _run(config: RunConfig, options: PlanOptions) -> Iterator[str]:
    for name, value in table(derive(config, options.world)):
        yield _row(name, value)
    for network in run_networks(config)[1:]:
        yield _row(network.role, f"{count_parameters(network.architecture):,}", f"parameters, {_state(network)}")


def _state(network: Network) -> str:
    if network.base == "student's":
        return "of the student's frozen base" + ("" if network.role == "teacher" else ", and an adapter of its own")
    state = "trained" if isinstance(network.adapter, FullTraining) else "frozen"
    return state + ("; taken to be as large as the student, its config is not here" if network.assumed else "")


def _operations(parts: list[Part]) -> Iterator[str]:
    whole = sum(part.flops for part in parts)
    for part in parts:
        note = ", in float32" if part.precision == "fp32" else ""
        note += f", in {part.share:.0%} of the steps" if part.share < 1 else ""
        yield _row(
            part.name, _tera(part.flops), f"{part.flops / whole:4.0%}", f"{round(part.samples, 1):g} samples{note}"
        )
    work = sum(part.flops for part in parts if part.counts)
    yield _row("all", _tera(whole), "100%", f"{work / whole:.0%} of it is work, the rest is done twice or for nothing")


def _memory(memory: Memory, have: float, gpus: int) -> Iterator[str]:
    for name, size in memory.parts:
        yield _row(name, _gib(size))
    fits = "fits" if memory.total <= have * GIB else "does not fit"
    yield _row("all", _gib(memory.total), f"of {have:g} GiB: {fits}")
    if memory.host:
        yield _row("in the host's memory, all GPUs of a node", _gib(memory.host * gpus))


def _time(config: RunConfig, options: PlanOptions, parts: list[Part]) -> Iterator[str]:
    gpu = GPUS[options.gpu]
    by_precision = step_seconds(parts, gpu, options.world, options.utilisation)
    seconds = sum(by_precision.values())
    peak = f"{options.utilisation:.0%} of {gpu.bf16:g} TFLOP/s (bfloat16) and {gpu.fp32:g} (float32)"
    yield _row("a step", f"{seconds:.1f} s", f"at {peak}")
    if by_precision["fp32"] and config.engine.precision == "bf16" and isinstance(config.objective, FlowMap):
        share = by_precision["fp32"] / seconds
        yield _row("of it in float32", f"{by_precision['fp32']:.1f} s", f"{share:.0%}: objective.derivative_precision")
    hours = config.steps * seconds / HOUR
    gpu_hours = hours * options.world
    yield _row(f"{config.steps:,} steps", f"{hours:,.1f} h", f"{gpu_hours:,.0f} GPU-hours, without validation")
    if options.price is not None:
        yield _row("cost", f"{gpu_hours * options.price:,.0f}", f"at {options.price:g} for a GPU-hour")


def _row(name: str, value: str, *notes: str) -> str:
    cells = "  ".join(notes)
    return f"  {name:<42}{value:>14}  {cells}".rstrip() if notes else f"  {name:<42}{value:>14}"


def _tera(flops: float) -> str:
    return f"{flops / TERA:,.1f} TFLOP"


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
