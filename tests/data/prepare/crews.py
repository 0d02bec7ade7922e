"""Several processes of one `anyflow prepare` without a launcher, forked from a process that has done the imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.prepare import command
from anyflow_train.data.prepare import output_lock as claim
from anyflow_train.data.prepare.command import run
from anyflow_train.errors import UserError
from tests.data.prepare.videos import held


def start(configs: list[PrepareConfig], log: Path) -> list[BaseProcess]:
    """Start one process for each config. All of them print to one file."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    crew: list[BaseProcess] = [
        context.Process(target=_work, args=(rank, len(configs), port, log, config), daemon=True)
        for rank, config in enumerate(configs)
    ]
    for process in crew:
        process.start()
    return crew


def finish(crew: list[BaseProcess]) -> list[int | None]:
    """Wait for all. Returns their exit codes."""
    for process in crew:
        process.join(200)
    return [process.exitcode for process in crew]


def _work(rank: int, size: int, port: int, log: Path, config: PrepareConfig) -> None:
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "localhost"}
    command.read_clip = held
    claim.VISIBLE_SECONDS = 2.0  # this is no network file system
    try:
        run(config)
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
