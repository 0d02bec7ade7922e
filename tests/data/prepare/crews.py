"""Several processes of one `anyflow prepare` without a launcher, forked from a process that has done the imports."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

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


def changes(config: PrepareConfig, kill_at: int | None = None) -> tuple[int, int | None]:
    """Prepare in a process of its own, which is killed before the change of the file system of a number.

    Returns:
        Number of its changes of the file system, and its exit code.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    counted = context.Value("i", 0)
    job = context.Process(target=_prepare_and_count, args=(config, kill_at, counted), daemon=True)
    job.start()
    job.join(100)
    return counted.value, job.exitcode


def _prepare_and_count(config: PrepareConfig, kill_at: int | None, counted: Any) -> None:
    replace, unlink = os.replace, Path.unlink

    def change() -> None:
        counted.value += 1
        if counted.value == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def replaced(*places: Any) -> None:
        change()
        replace(*places)

    def unlinked(path: Path, missing_ok: bool = False) -> None:
        if path.exists():
            change()
        unlink(path, missing_ok)

    os.replace, Path.unlink = replaced, unlinked  # pyright: ignore[reportAttributeAccessIssue]
    run(config)


def _work(rank: int, size: int, port: int, log: Path, config: PrepareConfig) -> None:
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    variables = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "localhost"}
    command.read_windows = held
    claim.VISIBLE_SECONDS = 2.0  # this is no network file system
    try:
        run(config)
    except UserError as error:
        print(f"error: {error}", flush=True)
        sys.exit(2)
