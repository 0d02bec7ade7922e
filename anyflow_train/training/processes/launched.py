"""A process and its launcher: where its output goes, whose death it follows, and how its exit code gets home.

No torch here: all of it is in force before torch is imported.
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
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

PREEMPTED = 75
"""Exit code of a run that a scheduler interrupted and should start again (EX_TEMPFAIL of sysexits.h)."""

# launch/train.sh's folder: `launcher` holds its process id; the processes add theirs to `processes`, and those that
# leave in order their exit code to `codes`, because torch's launcher makes every code a 1 and adds a page of its own.
FOLDER = "ANYFLOW_LAUNCH"
# A descriptor of the terminal, for processes whose output goes to a file.
TERMINAL = "ANYFLOW_TERMINAL"
LOOK_SECONDS = 0.5


def rank() -> int:
    """This process's number among all of the launch; 0 without a launcher."""
    return _number("RANK")


def local_rank() -> int:
    """This process's number among those of its node; 0 without a launcher."""
    return _number("LOCAL_RANK")


def owns_terminal() -> bool:
    """Whether this process may report where its output goes: on a terminal one process of a node is enough."""
    return local_rank() == 0 or TERMINAL in os.environ


def register_with_launcher() -> None:
    """Make this process known to the launcher, and follow the launcher into its death.

    Nobody would wait for processes whose launcher is gone, and the run's directory would stay locked.
    """
    folder = os.environ.get(FOLDER)
    if folder:
        _append(Path(folder) / "processes", f"{os.getpid()}\n")
        signal.signal(signal.SIGUSR1, _leave_early)
    parents = _launchers(os.environ)
    if parents:
        threading.Thread(target=_follow, args=(os.getppid(), parents), daemon=True, name="launcher").start()


def record_exit_code(code: int, everywhere: bool) -> int:
    """The exit code for the operating system, after the true one was left with launch/train.sh.

    Args:
        everywhere: all processes of the launch leave with this code, so that none need be ended by the launcher.
    """
    folder = os.environ.get(FOLDER)
    if code == 0 or not folder:
        return code
    _append(Path(folder) / "codes", f"{code}\n")
    return 0 if everywhere else code


def exit_process(code: int) -> NoReturn:
    """Leave the process, as `sys.exit` does. One of several skips the interpreter's own end.

    Gloo's threads may still hold tensors then, and abort the process when they drop them: a finished run would look
    like a failed one.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()  # as the standard library's multiprocessing does
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def log_file(logs: Path, number: int) -> Path:
    """Where the output of a process goes."""
    return logs / f"process_{number:05d}.txt"


def send_output_to(logs: Path) -> None:
    """Only process 0 talks to the terminal: append this one's stdout and stderr to a file, after a line about it."""
    if rank() == 0:
        return
    try:
        logs.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log_file(logs, rank()), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:  # process 0 will say more about the folder
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
    """Write a line where a person sees it, whichever process this is."""
    os.write(int(os.environ.get(TERMINAL, "2")), f"{text}\n".encode())


def print_to_terminal(text: str) -> None:
    """Write a line on the terminal too, from a process whose output goes to a file."""
    if TERMINAL in os.environ:
        tell_terminal(f"{text} (process {rank()})")


def _launchers(environment: Mapping[str, str]) -> list[int]:
    """The processes that this one must not outlive. None for one that a person started."""
    parents = []
    if "TORCHELASTIC_RUN_ID" in environment or environment.get(FOLDER):
        parents.append(os.getppid())
    if environment.get(FOLDER):
        parents.append(int((Path(environment[FOLDER]) / "launcher").read_text()))
    return parents


def _follow(parent: int, launchers: list[int]) -> None:
    while os.getppid() == parent and all(_lives(launcher) for launcher in launchers):
        time.sleep(LOOK_SECONDS)
    os.write(2, b"\nerror: the launcher is gone, so this process ends; start again to go on\n")
    os._exit(1)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _leave_early(_number: int, _frame: FrameType | None) -> None:
    """The scheduler's signal before there is anything to save."""
    record_exit_code(PREEMPTED, everywhere=False)
    os._exit(PREEMPTED)


def _append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    return int(text) if text.isdecimal() else 0
