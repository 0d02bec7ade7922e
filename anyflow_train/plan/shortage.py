"""What a run is foreseen to need, for its start: whether it fits on its GPUs, and how much work a step is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.plan.dry_run import DryRun, dry_run
from anyflow_train.plan.fit import nearest_fit
from anyflow_train.plan.memory import GIB, plan_memory
from anyflow_train.training.memory_check import GpuMemory


@dataclass(frozen=True)
class RunForecast:
    """A dry run of a config on `world` processes."""

    config: RunConfig
    world: int
    found: DryRun

    @property
    def work(self) -> tuple[float, ...]:
        """Operations of a step of each stage, of all processes together, without those that checkpointing repeats."""
        return self.found.stages

    def memory_warning(self, strategy: str, gpus: Sequence[GpuMemory]) -> str | None:
        """What to warn of before a run starts; None if it should fit.

        A warning compares all that is planned with what is free. It is no more than that: the rest of the memory may
        be given back before it is needed. Only the bytes that stay on the GPU from step to step are certain, and they
        are compared with the whole GPU.

        Args:
            strategy: a file of `launch/`.
            gpus: of every process, by rank.

        Raises:
            UserError: no step can fit on one of the GPUs, however empty it is.
        """
        memory = plan_memory(self.config, self.found, strategy, self.world)
        lasting = sum(size for _, size in memory.state) - memory.assumed
        smallest = min(range(self.world), key=lambda rank: gpus[rank].total)
        if lasting > gpus[smallest].total:
            problem = (
                f"{_gib(lasting)} stay on each GPU from step to step (planned, {strategy} on {self.world}), and "
                f"{_where(smallest, gpus)} has {_gib(gpus[smallest].total)}"
            )
            raise UserError("GPU memory", f"{problem}; {self._advice(strategy, gpus[smallest].total)}")
        fullest = min(range(self.world), key=lambda rank: gpus[rank].free)
        gpu = gpus[fullest]
        if memory.total <= gpu.free:
            return None
        problem = (
            f"GPU memory may not suffice: {_gib(memory.total)} are planned ({strategy} on {self.world}), "
            f"{_gib(memory.total - gpu.free)} more than {_where(fullest, gpus)} has free of its {_gib(gpu.total)}"
        )
        return f"{problem}; {self._advice(strategy, gpu.free)}"

    def _advice(self, strategy: str, limit: int) -> str:
        found = nearest_fit(self.config, None, strategy, self.world, limit, self.found.costliest)
        if found is None:
            return "nothing but more or larger GPUs helps, or student/adapter=lora; see anyflow plan"
        setting, memory = found
        words = [change for change in setting.changes if not change.startswith("strategy=")]
        if setting.strategy != strategy:
            words.insert(0, f"launch/train.sh {setting.strategy}")
        return f"the nearest setting that fits ({_gib(memory.total)}): {' '.join(words)}"


def foresee(config: RunConfig, world: int) -> RunForecast:
    """Dry-run a config that its rules accept."""
    return RunForecast(config, world, dry_run(config, world))


def _where(rank: int, gpus: Sequence[GpuMemory]) -> str:
    return f"process {rank} ({gpus[rank].host})"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"
