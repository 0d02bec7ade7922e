"""Foresees at the start of a run whether it fits on its GPUs, and how much work a step is."""

from __future__ import annotations

from collections.abc import Sequence

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.plan.dry_run import DryRun, dry_run
from anyflow_train.plan.fit import nearest_fit
from anyflow_train.plan.memory import plan_memory
from anyflow_train.text import memory_size
from anyflow_train.training.memory_check import Forecast, GpuMemory


def foresee(config: RunConfig, strategy: str, gpus: Sequence[GpuMemory]) -> Forecast:
    """Make a dry run of a config that its rules accept.

    Raises:
        UserError: no step can fit on one of the GPUs, however empty it is.
    """
    found = dry_run(config, len(gpus))
    memory = plan_memory(config, found, strategy, len(gpus))
    return Forecast(memory_warning(config, found, strategy, gpus), memory.total, found.stages, found.by_precision)


def memory_warning(config: RunConfig, found: DryRun, strategy: str, gpus: Sequence[GpuMemory]) -> str | None:
    """Write a warning for the start of a run; None if it should fit.

    The warning compares all memory that is planned with the free memory. It is only a warning, because other processes
    may free memory before it is needed. Only the bytes that stay on the GPU from step to step are certain. They are
    compared with the whole GPU.

    Args:
        found: dry run of the config.
        strategy: a file of `launch/`.
        gpus: GPU of every process, by rank.

    Raises:
        UserError: no step can fit on one of the GPUs, however empty it is.
    """
    world = len(gpus)

    def advice(limit: int) -> str:
        nearest = nearest_fit(config, None, strategy, world, limit, found)
        if nearest is None:
            return "nothing but more or larger GPUs helps, or student/adapter=lora; see anyflow plan"
        setting, memory = nearest
        words = [change for change in setting.changes if not change.startswith("strategy=")]
        if setting.strategy != strategy:
            words.insert(0, f"launch/train.sh {setting.strategy}")
        return f"the nearest setting that fits ({memory_size(memory.total)}): {' '.join(words)}"

    memory = plan_memory(config, found, strategy, world)
    lasting = sum(size for _, size in memory.state) - memory.assumed
    rank, gpu = min(enumerate(gpus), key=lambda item: item[1].total)
    if lasting > gpu.total:
        lasts = f"{memory_size(lasting)} stay on each GPU from step to step (planned, {strategy} on {world})"
        problem = f"{lasts}, and process {rank} ({gpu.host}) has {memory_size(gpu.total)}"
        raise UserError("GPU memory", f"{problem}; {advice(gpu.total)}")
    rank, gpu = min(enumerate(gpus), key=lambda item: item[1].free)
    if memory.total <= gpu.free:
        return None
    problem = f"GPU memory may not suffice: {memory_size(memory.total)} are planned ({strategy} on {world}), "
    problem += f"{memory_size(memory.total - gpu.free)} more than process {rank} ({gpu.host}) has free"
    return f"{problem} of its {memory_size(gpu.total)}; {advice(gpu.free)}"
