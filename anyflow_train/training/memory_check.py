"""At the start, before anything slow: do the GPUs have the memory that the run is foreseen to need?"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.config.schedule import mean_over
from anyflow_train.text import duration, memory_size
from anyflow_train.training.engine import engine_name
from anyflow_train.training.gpus import TERA, known_gpu
from anyflow_train.training.processes.world import World

UTILISATION = 0.4
"""Share of the GPU's peak that a step is foreseen to reach, as in `anyflow plan`."""


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
    """What a run is foreseen to need.

    Attributes:
        warning: a sentence if a GPU is short of memory.
        memory: bytes on each GPU when it is fullest.
        work: operations of a step of each stage, of all processes, without repeated ones.
    """

    warning: str | None
    memory: int
    work: tuple[float, ...]

    def rows(self, config: RunConfig, device: str, world: int) -> list[tuple[str, str]]:
        """List what the start of a run shows. The time is left out for a GPU whose peak is not known."""
        rows = [("memory", f"{memory_size(self.memory)} on each GPU (planned)")]
        if (gpu := known_gpu(device)) is not None:
            work = mean_over(config, self.work, range(config.steps)) * config.steps
            peak = gpu.bf16 if config.engine.precision == "bf16" else gpu.fp32
            seconds = work / (TERA * peak * UTILISATION * world)
            rows.append(
                ("time", f"about {duration(seconds)} for {config.steps} steps, at {UTILISATION:.0%} of the peak")
            )
        return rows


Foresee = Callable[[RunConfig, str, Sequence[GpuMemory]], Forecast]
"""Config, strategy (a file of `launch/`), and GPU of each process -> forecast. Raises UserError if
the run cannot fit."""


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
