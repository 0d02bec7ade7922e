"""At the start, before anything slow: do the GPUs have the memory that the run is foreseen to need?"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.training.engine import engine_name
from anyflow_train.training.processes.world import World


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


class Forecast(Protocol):
    """What a run is foreseen to need; `plan` makes it."""

    @property
    def work(self) -> tuple[float, ...]:
        """Operations of a step of each stage, of all processes together, without those that are done twice."""
        ...

    def memory_warning(self, strategy: str, gpus: Sequence[GpuMemory]) -> str | None:
        """What to warn of under a strategy (a file of `launch/`); None if all GPUs, by rank, have enough.

        Raises:
            UserError: the run cannot fit.
        """
        ...


Foresee = Callable[[RunConfig, int], Forecast]
"""Config and number of processes -> forecast."""


def check_memory(config: RunConfig, world: World, foresee: Foresee) -> tuple[float, ...] | None:
    """Print one warning, from process 0, if some GPU is short of memory.

    Returns:
        Operations of a step of each stage, as the forecast has them; None on a CPU, for which nothing is foreseen.

    Raises:
        SharedErrors: on every process, the run cannot fit.
    """
    if world.device.type != "cuda":
        return None
    gpus = world.gather(GpuMemory(socket.gethostname(), *torch.cuda.mem_get_info(world.device)))

    def look() -> tuple[str | None, tuple[float, ...]]:
        forecast = foresee(config, world.size)
        return forecast.memory_warning(engine_name(), gpus), forecast.work

    warning, work = world.on_main(look)
    if warning and world.is_main:
        print(f"warning: {warning}", file=sys.stderr)
    return work
