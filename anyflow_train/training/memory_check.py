"""At the start, before anything slow: do the GPUs have the memory that the run is foreseen to need?"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


Foresee = Callable[[RunConfig, str, Sequence[GpuMemory]], tuple[str | None, tuple[float, ...]]]
"""Config, strategy (a file of `launch/`), and GPU of each process -> a warning if a GPU is short of memory, and the
operations of a step of each stage, of all processes, without repeated ones. Raises UserError if the run cannot fit."""


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
    warning, work = world.on_main(lambda: foresee(config, engine_name(), gpus))
    if warning and world.is_main:
        print(f"warning: {warning}", file=sys.stderr)
    return work
