"""Connect a process with its launcher: output files, exit codes, and ending together with the launcher.

This module does not import torch, so that it works before torch is imported.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

PREEMPTED = 75
"""Exit code of a run that a scheduler interrupted and should start again (EX_TEMPFAIL of sysexits.h)."""

# Folder of launch/train.sh. Its file `launcher` holds the script's process id. Each process adds its process id to
# `processes`, and its exit code to `codes`, because torch's launcher turns every code into 1 and prints a long report.
FOLDER = "ANYFLOW_LAUNCH"
# File descriptor of the terminal, for processes whose output goes to a file.
TERMINAL = "ANYFLOW_TERMINAL"
LOOK_SECONDS = 0.5


def rank() -> int:
    """Number of this process in the launch; 0 without a launcher."""
    return _number("RANK")


def local_rank() -> int:
    """Number of this process on its node; 0 without a launcher."""
    return _number("LOCAL_RANK")


def owns_terminal() -> bool:
    """Whether this process may report errors: all whose output goes to a file, and one per node on the terminal."""
    return local_rank() == 0 or TERMINAL in os.environ


def register_with_launcher() -> None:
    """Register this process with the launcher, and end it when the launcher ends.

    Processes that outlive their launcher would keep the run's directory locked.
    """
    folder = os.environ.get(FOLDER)
    if folder:
        _append(Path(folder) / "processes", f"{os.getpid()}\n")
        signal.signal(signal.SIGUSR1, _leave_early)
    parents = _launchers(os.environ)
    if parents:
        threading.Thread(target=_follow, args=(os.getppid(), parents), daemon=True, name="launcher").start()


def record_exit_code(code: int, everywhere: bool) -> int:
    """Record the exit code for launch/train.sh. Returns the exit code for the operating system.

    Args:
        everywhere: whether all processes of the launch end with this code. Then the process ends with 0, because the
            launcher does not need to end the others.
    """
    folder = os.environ.get(FOLDER)
    if code == 0 or not folder:
        return code
    _append(Path(folder) / "codes", f"{code}\n")
    return 0 if everywhere else code


def exit_process(code: int) -> NoReturn:
    """End the process like `sys.exit`. A process of a launch skips the interpreter's shutdown.

    Gloo's threads may still hold tensors during the shutdown and abort the process when they release them. A finished
    run would look like a failed one.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()  # as the standard library's multiprocessing does
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def log_file(logs: Path, number: int) -> Path:
    """File for the output of a process."""
    return logs / f"process_{number:05d}.txt"


def send_output_to(logs: Path) -> None:
    """Append stdout and stderr of every process except process 0 to a file, after a line that names the process."""
    if rank() == 0:
        return
    try:
        logs.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log_file(logs, rank()), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:  # process 0 reports the folder's problem
        print(f"warning: process {rank()} has no log file: {error}", file=sys.stderr)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.environ[TERMINAL] = str(os.dup(2))
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    print(f"== {now}  process {rank()} on {socket.gethostname()}, pid {os.getpid()}")


def tell_terminal(text: str) -> None:
    """Write a line to the terminal, from any process. Does nothing if its reader has ended: the caller must end too."""
    with suppress(OSError):
        os.write(int(os.environ.get(TERMINAL, "2")), f"{text}\n".encode())


def print_to_terminal(text: str) -> None:
    """Write a line to the terminal if this process's output goes to a file."""
    if TERMINAL in os.environ:
        tell_terminal(f"{text} (process {rank()})")


def _launchers(environment: Mapping[str, str]) -> list[int]:
    """Process ids that this process must not outlive. Empty for a process that was started by hand."""
    if environment.get(FOLDER):
        return [os.getppid(), int((Path(environment[FOLDER]) / "launcher").read_text())]
    return [os.getppid()] if "TORCHELASTIC_RUN_ID" in environment else []


def _follow(parent: int, launchers: list[int]) -> None:
    while os.getppid() == parent and all(psutil.pid_exists(launcher) for launcher in launchers):
        time.sleep(LOOK_SECONDS)
    with suppress(OSError):  # the reader of stderr may have ended with the launcher
        os.write(2, b"\nerror: the launcher has ended, so this process ends; start again to resume\n")
    os._exit(1)


def _leave_early(_number: int, _frame: FrameType | None) -> None:
    """Handle the scheduler's signal before the run starts, when there is nothing to save."""
    record_exit_code(PREEMPTED, everywhere=False)
    os._exit(PREEMPTED)


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    return int(text) if text.isdecimal() else 0
