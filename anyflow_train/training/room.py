"""At the start, before anything slow: do the GPUs have the memory that the run is planned to need?"""

from __future__ import annotations

import socket
import sys

import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.plan.room import Room, shortage
from anyflow_train.training.engine import engine_name
from anyflow_train.training.processes.world import World


def check_room(config: RunConfig, world: World) -> None:
    """Print one warning, from process 0, where some GPU is short of memory. Nothing on a CPU.

    Raises:
        SharedErrors: on every process, the run cannot fit.
    """
    if world.device.type != "cuda":
        return
    rooms = world.gather(Room(socket.gethostname(), *torch.cuda.mem_get_info(world.device)))
    warning = world.on_main(lambda: shortage(config, engine_name(), rooms))
    if warning and world.is_main:
        print(f"warning: {warning}", file=sys.stderr)
