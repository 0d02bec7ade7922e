"""The processes of one `anyflow prepare`: process 0 deals the work and reports, every one does its share on its own.

They never wait for each other while they work, so that one may take much longer than another. What they say goes
through the launcher's key-value store, which lives and dies with the launch: nothing that a killed one has left behind
can be mistaken for news.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TypeVar

from torch.distributed import (
    DistError,
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage] (documented)
    Store,  # pyright: ignore[reportPrivateImportUsage]
    rendezvous,  # pyright: ignore[reportPrivateImportUsage]
)

from anyflow_train.config.derived import world_size
from anyflow_train.errors import UserError, UserErrors

T = TypeVar("T")

# How often a process looks for news, and at most how often it tells its own.
NEWS_SECONDS = 0.5
# Processes may start minutes apart: on some nodes Python itself comes over the network.
JOIN_TIMEOUT = timedelta(minutes=30)


@dataclass
class WorkerReport:
    """What a process says of itself.

    Attributes:
        counts: clips done, by task.
        finished: its share is done.
        errors: why it cannot go on; key and problem of each UserError.
    """

    counts: dict[str, int] = field(default_factory=dict)
    finished: bool = False
    errors: list[tuple[str, str]] = field(default_factory=list)


class Workers:
    """The processes, as one of them sees them. Made by `join_workers`.

    Attributes:
        rank, size: of this process among all.
        local_rank: of this process on its node.
    """

    def __init__(self, rank: int, size: int, local_rank: int, store: Store | None) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self._store = store
        self._report = WorkerReport()
        self._others: list[WorkerReport] = []
        self._heard = -NEWS_SECONDS
        self._tell()

    @property
    def is_main(self) -> bool:
        """Whether this process deals the work and talks to people."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Process 0's value, which must survive JSON; the others wait for it as long as it takes."""
        if self._store is None:
            return value
        if self.is_main:
            self._store.set("job", json.dumps(value))
        else:
            while not self._store.check(["job"]):
                time.sleep(NEWS_SECONDS)
        return json.loads(self._store.get("job"))

    def count(self, task: str, done: int) -> int:
        """Note how many clips this process has done. Returns, on process 0, how many all of them have.

        Raises:
            UserErrors: on process 0, where another cannot go on.
        """
        self._report.counts[task] = done
        self._exchange()
        return done + sum(other.counts.get(task, 0) for other in self._others)

    def finish(self, task: str, show: Callable[[int], object]) -> None:
        """Say that this process's share is done. Process 0 waits for the others, and shows the clips of all meanwhile.

        Raises:
            UserErrors: on process 0, where another cannot go on.
        """
        self._report.finished = True
        self._tell()
        while self._store is not None and self.is_main:
            show(self.count(task, self._report.counts.get(task, 0)))
            if self._others and all(other.finished for other in self._others):
                return
            time.sleep(NEWS_SECONDS)

    def report_errors(self, errors: list[UserError]) -> None:
        """Leave this process's errors to process 0, which says them once and ends; the launcher then ends this one."""
        self._report.errors = [(error.where, error.problem) for error in errors]
        self._tell()
        while self._store is not None:
            self._store.check(["job"])  # fails when the store has gone
            time.sleep(NEWS_SECONDS)

    def _exchange(self) -> None:
        if self._store is None or time.monotonic() - self._heard < NEWS_SECONDS:
            return
        self._heard = time.monotonic()
        if self.is_main:
            self._listen()
        else:
            self._tell()

    def _tell(self) -> None:
        if self._store is not None and not self.is_main:
            self._store.set(_key(self.rank), json.dumps(asdict(self._report)))

    def _listen(self) -> None:
        assert self._store is not None
        keys = [_key(rank) for rank in range(1, self.size)]
        if not self._store.check(keys):
            return  # some have not started yet
        self._others = [WorkerReport(**json.loads(text)) for text in self._store.multi_get(keys)]
        errors = dict.fromkeys((where, problem) for other in self._others for where, problem in other.errors)
        if errors:
            raise UserErrors([UserError(where, problem) for where, problem in errors])


@contextmanager
def join_workers() -> Iterator[Workers]:
    """Join the processes that a launcher started; process 0 speaks for all of them.

    Raises:
        UserError: on process 0, also for what the others found.
        SystemExit: on the others.
    """
    workers = _join()
    try:
        yield workers
    except DistError as error:
        problem = "has lost contact with the other processes; the same command continues"
        if workers.is_main:
            raise UserError("prepare", problem) from error
        raise SystemExit(1) from error
    except UserError as error:
        if workers.is_main:
            raise
        _leave_to_main(workers, list(error.errors) if isinstance(error, UserErrors) else [error])
    except KeyboardInterrupt:
        if workers.is_main:
            raise
        raise SystemExit(130) from None


def _leave_to_main(workers: Workers, errors: list[UserError]) -> None:
    with suppress(DistError):  # process 0 has ended first
        workers.report_errors(errors)
    raise SystemExit(2)


def _join() -> Workers:
    size = world_size()
    if size == 1:
        return Workers(0, 1, 0, None)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError("WORLD_SIZE", f"is {size}, but {missing[0]} is missing; start with `accelerate launch`")
    store, rank, size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
    return Workers(rank, size, int(os.environ.get("LOCAL_RANK", "0")), PrefixStore("prepare", store))


def _key(rank: int) -> str:
    return f"process_{rank}"
