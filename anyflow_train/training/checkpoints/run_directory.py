"""The folder of a run, and the lock that prevents a second start in it."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.files import read_json, read_object, take_lock, to_json, write_json
from anyflow_train.training.checkpoints.config_file import saved_config
from anyflow_train.training.checkpoints.state import checkpoint_name

SHARED_SECONDS = 30.0
"""Longest time until a network file system shows a new file on another node."""


class RunDirectory:
    """`<out>/<name>`: stable, so that a requeued job finds its checkpoint.

    Attributes:
        path: the directory; it may not exist yet.
        checkpoints: folder with one folder per kept checkpoint, and the file `best`.
        metrics: file with one JSON object per line for every logged step.
        logs: folder with the output of every process except process 0, and the reports of a hanging run.
        profile: folder with traces of a few steps, one file per process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints, self.logs, self.profile = (path / name for name in ("checkpoints", "logs", "profile"))
        self.metrics = path / "metrics.jsonl"

    @classmethod
    def of(cls, config: RunConfig) -> RunDirectory:
        """Return the directory of a run."""
        return cls(Path(config.out).expanduser() / config.name)

    def validation(self, step: int) -> Path:
        """Folder with the videos of one validation."""
        return self.path / "validation" / checkpoint_name(step)

    def begin(self, config: RunConfig, inputs: Mapping[str, str] | None = None) -> None:
        """Save the resolved config, and facts about the content of its inputs.

        Removes the summary of a finished run, which now continues with more steps.
        """
        (self.path / "done.json").unlink(missing_ok=True)
        if inputs is not None:
            write_json(self.path / "inputs.json", inputs)
        write_json(self.path / "config.json", saved_config(config))

    def read_config(self) -> dict[str, Any] | None:
        """Read the config of the last start, not decoded; None if it is missing or damaged."""
        return _read_json(self.path / "config.json")

    def read_inputs(self) -> dict[str, str]:
        """Read the facts about the inputs of the first start; empty if there are none."""
        return {key: str(fact) for key, fact in read_object(self.path / "inputs.json").items()}

    def write_done(self, summary: dict[str, Any]) -> None:
        """Write the summary of the finished run."""
        write_json(self.path / "done.json", summary)

    def read_done(self) -> dict[str, Any] | None:
        """Read the summary of a finished run; None if the run is not finished, or if the summary is damaged."""
        return _read_json(self.path / "done.json")

    @contextmanager
    def locked(self) -> Iterator[str]:
        """Lock the directory. The kernel releases the lock when the process ends, also when it is killed.

        Returns:
            A random id of this start, which is also in the lock file, for `check_shared`.

        Raises:
            UserError: another process holds the lock, or the directory cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if not os.access(self.checkpoints, os.W_OK | os.X_OK):  # otherwise found at the first save
                raise UserError(str(self.checkpoints), "cannot be written; give it write access or choose another out")
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(str(self.path), f"cannot be written ({error.strerror}); choose another out") from None
        try:
            # A record lock, because forked data workers would inherit a flock(2) lock and hold it after a killed run.
            if not take_lock(fcntl.lockf, descriptor, fcntl.LOCK_EX, self.path):
                raise UserError(str(self.path), f"is in use by {self._holder()}; wait for it or choose another name")
            start = secrets.token_hex(8)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, to_json({"pid": os.getpid(), "host": socket.gethostname(), "start": start}), 0)
            yield start
        finally:
            os.close(descriptor)

    def check_shared(self, start: str) -> None:
        """Wait for the id of process 0's start in the lock file. Process 0 must not call it: closing the file unlocks.

        Raises:
            UserError: this process does not see the directory of process 0.
        """
        deadline = time.monotonic() + SHARED_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError, ValueError, KeyError):
                if read_json(self.path / "lock")["start"] == start:
                    return
            time.sleep(0.1)
        problem = f"on {socket.gethostname()} is not the run directory of process 0; use a folder that all nodes share"
        raise UserError(str(self.path), problem)

    def _holder(self) -> str:
        with suppress(OSError, ValueError, KeyError):
            holder = read_json(self.path / "lock")
            return f"process {holder['pid']} on {holder['host']}"
        return "another process"


def runs_of_sweep(source: str) -> list[Path]:
    """List the run directories of a sweep's folder that are finished; empty if the source is not a sweep.

    The folder may have been moved since.
    """
    folder, runs = Path(source).expanduser(), []
    with suppress(OSError, ValueError, TypeError, KeyError):
        for row in read_json(folder / "sweep.json"):
            place = folder / Path(row["label"]).name
            runs += [place] if _read_json(place / "done.json") else []
    return runs


def _read_json(path: Path) -> dict[str, Any] | None:
    with suppress(FileNotFoundError, ValueError):
        content = read_json(path)
        return content if isinstance(content, dict) else None
    return None
