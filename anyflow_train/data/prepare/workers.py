"""The processes of one `anyflow prepare`: process 0 distributes the work and reports the progress of all.

Processes do not wait for each other while they work, so that one may take much longer than another. Their reports go
through the launcher's key-value store. The store ends with the launch, so no report of an earlier, killed job is left.
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
from anyflow_train.errors import UserError, raise_all

T = TypeVar("T")

# Interval at which processes send their reports, and at which process 0 reads them.
NEWS_SECONDS = 0.5
# Processes may start minutes apart, because some nodes load Python over the network.
JOIN_TIMEOUT = timedelta(minutes=30)


@dataclass
class WorkerReport:
    """Report of one process.

    Attributes:
        counts: clips done, by task.
        finished: whether the share of the process is done.
        errors: key and problem of each UserError that stopped the process.
    """

    counts: dict[str, int] = field(default_factory=dict)
    finished: bool = False
    errors: list[tuple[str, str]] = field(default_factory=list)


class Workers:
    """All processes of the job, as seen from one of them. Made by `join_workers`.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_rank: number of this process on its node.
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
        """Whether this process distributes the work and prints messages."""
        return self.rank == 0

    def share(self, value: T) -> T:
        """Return the value of process 0, as JSON decodes it. The other processes wait for it without a limit."""
        if self._store is None:
            return value
        if self.is_main:
            self._store.set("job", json.dumps(value))
        else:
            while not self._store.check(["job"]):
                time.sleep(NEWS_SECONDS)
        return json.loads(self._store.get("job"))

    def count(self, task: str, done: int) -> int:
        """Report the number of clips that this process has done.

        Returns:
            On process 0, the clips that all processes have done; on others, `done`.

        Raises:
            UserErrors: on process 0, if errors stopped another process.
        """
        self._report.counts[task] = done
        self._exchange()
        return done + sum(other.counts.get(task, 0) for other in self._others)

    def finish(self, task: str, show: Callable[[int], object]) -> None:
        """Report that this process's share is done. Process 0 waits for the others.

        Args:
            task: the task that is counted.
            show: called with the clips of all processes while process 0 waits.

        Raises:
            UserErrors: on process 0, if errors stopped another process.
        """
        self._report.finished = True
        self._tell()
        while self._store is not None and self.is_main:
            show(self.count(task, self._report.counts.get(task, 0)))
            if self._others and all(other.finished for other in self._others):
                return
            time.sleep(NEWS_SECONDS)

    def report_errors(self, errors: list[UserError]) -> None:
        """Send errors to process 0, which prints them and ends. Wait until the launcher ends this process."""
        self._report.errors = [(error.where, error.problem) for error in errors]
        self._tell()
        while self._store is not None:
            self._store.check(["job"])  # raises when process 0 has closed the store
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
        raise_all([UserError(where, problem) for where, problem in errors])


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
        _leave_to_main(workers, list(error.errors))
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
        raise UserError("WORLD_SIZE", f"is {size}, but {missing[0]} is not set; start with `accelerate launch`")
    store, rank, size = next(rendezvous("env://", timeout=JOIN_TIMEOUT))
    return Workers(rank, size, int(os.environ.get("LOCAL_RANK", "0")), PrefixStore("prepare", store))


def _key(rank: int) -> str:
    return f"process_{rank}"
