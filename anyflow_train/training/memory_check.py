"""Check at the start, before anything slow, that the GPUs have the memory that the run is foreseen to need."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from anyflow_train.config.commands import PlanOptions
from anyflow_train.config.run import RunConfig
from anyflow_train.text import duration, memory_size
from anyflow_train.training.engine import engine_name
from anyflow_train.training.gpus import known_gpu, step_seconds
from anyflow_train.training.processes.world import World

UTILISATION = PlanOptions.model_fields["utilisation"].default


@dataclass(frozen=True)
class GpuMemory:
    """Memory of one process's GPU.

    Attributes:
        host: the machine's name.
        free, total: bytes.
    """

    host: str
    free: int
    total: int


@dataclass(frozen=True)
class Forecast:
    """Foreseen needs of a run.

    Attributes:
        warning: a sentence if a GPU is short of memory.
        memory: bytes on each GPU when it is fullest.
        work: number of operations of a step of all processes, for each stage. What checkpointing repeats is left out.
        operations: number of operations of the dearest step, in `half` precision and in `float32`. What checkpointing
            repeats is counted.
    """

    warning: str | None
    memory: int
    work: tuple[float, ...]
    operations: Mapping[str, float]

    def rows(self, config: RunConfig, device: str, world: int) -> list[tuple[str, str]]:
        """List the rows that the start of a run shows: memory, and the time if the peak of the GPU is known."""
        rows = [("memory", f"{memory_size(self.memory)} on each GPU (planned)")]
        if (gpu := known_gpu(device)) is not None:
            seconds = sum(step_seconds(self.operations, gpu, world, UTILISATION).values()) * config.steps
            rows.append(
                ("time", f"about {duration(seconds)} for {config.steps} steps, at {UTILISATION:.0%} of the peak")
            )
        return rows


Foresee = Callable[[RunConfig, str, Sequence[GpuMemory]], Forecast]
"""Makes a forecast from a config, a strategy (a file of `launch/`) and the GPU of each process.

Raises UserError if the run cannot fit.
"""


def check_memory(config: RunConfig, world: World, foresee: Foresee) -> Forecast | None:
    """Print one warning, from process 0, if some GPU is short of memory.

    Returns:
        The forecast; None on a CPU, for which nothing is foreseen.

    Raises:
        SharedErrors: on every process, the run cannot fit.
    """
    if world.device.type != "cuda":
        return None
    gpus = world.gather(GpuMemory(socket.gethostname(), *torch.cuda.mem_get_info(world.device)))
    forecast = world.on_main(lambda: foresee(config, engine_name(), gpus))
    if forecast.warning and world.is_main:
        print(f"warning: {forecast.warning}", file=sys.stderr)
    return forecast
