"""Several processes of one `anyflow prepare` without a launcher, forked from a process that has done the imports."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from anyflow_train.config.commands import PrepareConfig
from anyflow_train.data.prepare import command
from anyflow_train.data.prepare import output_lock as claim
from anyflow_train.data.prepare.command import run
from anyflow_train.errors import UserError
from tests.data.prepare.videos import held

_CLEAN = multiprocessing.get_context("forkserver")
_CLEAN.set_forkserver_preload([__name__])


def start(configs: list[PrepareConfig], log: Path) -> list[BaseProcess]:
    """Start one process for each config. All of them print to one file."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [begin(_work, rank, len(configs), port, log, config) for rank, config in enumerate(configs)]


def begin(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a function in a process of its own: no lock that a thread of the tests may hold is copied into it."""
    process = _CLEAN.Process(target=target, args=arguments, daemon=True)
    process.start()
    return process


def prepare_interruptibly(config: PrepareConfig) -> None:
    """Prepare with SIGINT enabled. Shells ignore it for background jobs, and the test suite may be one."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command.read_windows = held
    run(config)


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
    counted = _CLEAN.Value("i", 0)
    job = begin(_prepare_and_count, config, kill_at, counted)
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
