"""The processes of one `anyflow prepare`: process 0 distributes the work and reports the progress of all.

Processes do not wait for each other while they work, so that one may take much longer than another. Their reports go
through the launcher's key-value store. The store ends with the launch, so no report of an earlier, killed job is left.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from torch.distributed import (
    DistError,
    HashStore,  # pyright: ignore[reportPrivateImportUsage]
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage] (documented)
    Store,  # pyright: ignore[reportPrivateImportUsage]
    rendezvous,  # pyright: ignore[reportPrivateImportUsage]
)

from anyflow_train.config.derived import world_size
from anyflow_train.errors import UserError, UserErrors

T = TypeVar("T")

# Interval at which processes look for news of the others while they wait.
NEWS_SECONDS = 0.5
# Processes may start minutes apart, because some nodes load Python over the network.
JOIN_TIMEOUT = timedelta(minutes=30)
ERRORS = "errors"


@dataclass(frozen=True)
class Workers:
    """All processes of the job, as seen from one of them. Made by `join_workers`.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number of this process on its node.
        store: key-value store of all processes.
    """

    rank: int
    size: int
    local_rank: int
    store: Store

    @property
    def is_main(self) -> bool:
        """Whether this process distributes the work and prints messages."""
        return self.rank == 0

    def share(self, name: str, value: T) -> T:
        """Return process 0's value of a name, as JSON decodes it. The other processes wait for it without a limit."""
        if self.is_main:
            self.store.set(name, json.dumps(value))
        while not self.store.check([name]):
            time.sleep(NEWS_SECONDS)
        return json.loads(self.store.get(name))

    def count(self, task: str, clips: int) -> int:
        """Add clips to those of a task that all processes have done. Returns the sum.

        Raises:
            UserErrors: on process 0, if errors stopped another process.
        """
        if self.is_main and self.store.check([ERRORS]):
            different = dict.fromkeys(self.store.get(ERRORS).decode().splitlines())
            raise UserErrors([UserError(*json.loads(line)) for line in different])
        return self.store.add(task, clips)

    def await_all(self, place: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Mark that this process has come to a place. Process 0 waits for the others, which need its store.

        Raises:
            UserErrors: on process 0, if errors stopped another process.
        """
        arrived = self.count(place, 1)
        while self.is_main and arrived < self.size:
            time.sleep(NEWS_SECONDS)
            meanwhile()
            arrived = self.count(place, 0)

    def report_errors(self, errors: Sequence[UserError]) -> None:
        """Send errors to process 0, which prints them and ends. Wait until the launcher ends this process."""
        lines = "".join(json.dumps([error.where, error.problem]) + "\n" for error in errors)
        self.store.append(ERRORS, lines)  # pyright: ignore[reportAttributeAccessIssue]
        while True:
            self.store.check([ERRORS])  # raises when process 0 has closed the store
            time.sleep(NEWS_SECONDS)


@contextmanager
def join_workers() -> Iterator[Workers]:
    """Join the processes that a launcher started. Process 0 reports the errors of all of them.

    Raises:
        UserError: on process 0, also for errors of other processes.
        SystemExit: on the other processes.
        KeyboardInterrupt: on process 0.
    """
    workers = _join()
    try:
        yield workers
    except DistError as error:
        problem = "lost contact with the other processes; run the same command to continue"
        if workers.is_main:
            raise UserError("prepare", problem) from error
        raise SystemExit(1) from error
    except UserError as error:
        if workers.is_main:
            raise
        with suppress(DistError):  # process 0 has ended first
            workers.report_errors(error.errors)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        if workers.is_main:
            raise
        raise SystemExit(130) from None


def _join() -> Workers:
    size = world_size()
    if size == 1:
        return Workers(0, 1, 0, HashStore())
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError("WORLD_SIZE", f"is {size}, but {missing[0]} is not set; start with `accelerate launch`")
    store, rank, size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
    return Workers(rank, size, int(os.environ.get("LOCAL_RANK", "0")), PrefixStore("prepare", store))
