"""The run's own folder, and the lock that keeps a second start out of it."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_train.config.run import RunConfig
from anyflow_train.errors import UserError
from anyflow_train.files import replace_file, take_lock, to_json
from anyflow_train.training.checkpoints.config_file import saved_config

SHARED_SECONDS = 30.0
"""How long a network file system may take to show on one node what another has written."""


@dataclass(frozen=True)
class RunDirectory:
    """`<out>/<name>`: stable, so that a requeued job finds its checkpoint."""

    path: Path

    @classmethod
    def of(cls, config: RunConfig) -> RunDirectory:
        """The directory of a run; it need not exist yet."""
        return cls(Path(config.out).expanduser() / config.name)

    @property
    def checkpoints(self) -> Path:
        """One folder per kept checkpoint, and the file `best`."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a line for every logged step."""
        return self.path / "metrics.jsonl"

    @property
    def logs(self) -> Path:
        """The output of every process but the first, and what processes leave that found the run hanging."""
        return self.path / "logs"

    @property
    def profile(self) -> Path:
        """Traces of a few steps, one file of every process."""
        return self.path / "profile"

    def validation(self, step: int) -> Path:
        """Where the videos of one validation go."""
        return self.path / "validation" / f"step_{step:08d}"

    def begin(self, config: RunConfig) -> None:
        """Save the resolved config. A finished run that was given more steps is unfinished again."""
        (self.path / "done.json").unlink(missing_ok=True)
        replace_file(self.path / "config.json", to_json(saved_config(config)))

    def read_config(self) -> dict[str, Any]:
        """The config of the last start, undecoded."""
        return json.loads((self.path / "config.json").read_text())

    def write_done(self, summary: dict[str, Any]) -> None:
        """Say that the run has ended, and how."""
        replace_file(self.path / "done.json", to_json(summary))

    def read_done(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        with suppress(FileNotFoundError):
            return json.loads((self.path / "done.json").read_text())
        return None

    @contextmanager
    def locked(self) -> Iterator[str]:
        """Hold the directory. The kernel drops the lock with the process, so a killed run leaves none behind.

        Returns:
            A word for this start, which is now in the directory, for `check_shared`.

        Raises:
            UserError: another process holds it, named with its host; or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(str(self.path), f"cannot be written ({error.strerror}); choose another out") from None
        try:
            self._take(descriptor)
            start = secrets.token_hex(8)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, to_json({"pid": os.getpid(), "host": socket.gethostname(), "start": start}), 0)
            yield start
        finally:
            os.close(descriptor)

    def check_shared(self, start: str) -> None:
        """Look for the word of process 0's start. Not for process 0: closing the file would drop its lock.

        Raises:
            UserError: this process sees another directory than process 0.
        """
        deadline = time.monotonic() + SHARED_SECONDS
        while time.monotonic() < deadline:
            with suppress(OSError, ValueError, KeyError):
                if json.loads((self.path / "lock").read_text())["start"] == start:
                    return
            time.sleep(0.1)
        problem = f"on {socket.gethostname()} is not the run directory of process 0; put it where all nodes see it"
        raise UserError(str(self.path), problem)

    def _take(self, descriptor: int) -> None:
        # A record lock, not flock(2): forked data workers would inherit the latter and hold it after a killed run.
        if not take_lock(fcntl.lockf, descriptor, fcntl.LOCK_EX, self.path):
            raise UserError(str(self.path), f"is in use by {self._holder()}; wait for it or choose another name")

    def _holder(self) -> str:
        with suppress(OSError, ValueError, KeyError):
            holder = json.loads((self.path / "lock").read_text())
            return f"process {holder['pid']} on {holder['host']}"
        return "another process"
