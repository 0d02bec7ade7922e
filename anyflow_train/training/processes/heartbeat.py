"""Exchange regular reports between all processes, and end the run if a process hangs or is lost.

Each process has two threads. One exchanges reports through a small store on process 0, the other judges them, so that
a process also notices if the store stops. The training's own communication is not used. A single process has a store in
its own memory, and judges itself.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from pydantic import TypeAdapter
from torch.distributed import (
    HashStore,  # pyright: ignore[reportPrivateImportUsage] (documented)
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)

from anyflow_train.training.processes.hang_detector import HangDetector, ProcessReport, Verdict
from anyflow_train.training.processes.launched import log_file, tell_terminal
from anyflow_train.training.processes.world import World

LONGEST_INTERVAL = 5.0
LEAVING_SECONDS = 10.0
HUNG = 1
REPORT = TypeAdapter(ProcessReport)


class Heartbeat:
    """Reports for this process while the block runs, and ends the process if the run cannot continue.

    Args:
        seconds: time within which a hanging process is reported.
        logs: folder for the message and the stack traces of the processes that noticed it.
    """

    def __init__(self, world: World, seconds: float, logs: Path) -> None:
        self._world, self._logs = world, logs
        self._interval = min(seconds / 10, LONGEST_INTERVAL)
        # the other processes read a report up to two intervals after the activity began
        self._hang_detector = HangDetector(seconds - 2 * self._interval)
        self._own = ProcessReport(world.rank, socket.gethostname(), os.getpid(), os.getppid())
        self._leaving = threading.Event()
        self._lost_since: float | None = None
        self._left_since: float | None = None

    def __enter__(self) -> Heartbeat:
        self._store = _open_store(self._world)
        self._report(exited=False)
        self._reports = self._world.gather(self._own)
        self._heard = time.monotonic()
        self._threads = [threading.Thread(target=loop, daemon=True) for loop in (self._exchange, self._guard)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world.size > 1 and isinstance(error, RuntimeError):
            # Communication fails after another process has ended because of a hang. Let the guard report the hang.
            time.sleep(3 * self._interval)
        self._leaving.set()
        self._threads[1].join()  # it may be reporting a hang, and then ends this process
        if error is None:
            self._world.gather(None)  # process 0 keeps the store until all processes are here
        self._threads[0].join(self._interval)  # otherwise its last report could overwrite this one
        with suppress(RuntimeError):
            self._report(exited=True)

    def _exchange(self) -> None:
        """Send and read reports until the block ends or the store stops."""
        keys = [str(rank) for rank in range(self._world.size)]
        beats = 0
        with suppress(RuntimeError):  # the store ended with process 0
            while not self._leaving.is_set():
                beats += 1
                self._own = dataclasses.replace(self._own, beats=beats)
                self._report(exited=False)
                self._reports = [REPORT.validate_json(text) for text in self._store.multi_get(keys)]
                self._heard = time.monotonic()
                self._leaving.wait(self._interval)
        self._lost_since = time.monotonic()

    def _report(self, exited: bool) -> None:
        report = dataclasses.replace(self._own, exited=exited, activity=self._world.activity)
        self._store.set(str(self._world.rank), REPORT.dump_json(report).decode())

    def _guard(self) -> None:
        before = time.monotonic()
        while not self._leaving.wait(self._interval):
            now = time.monotonic()
            if now - before > 5 * self._interval:
                self._hang_detector.forget()  # this process itself was stopped for a while
                self._heard = now
            before = now
            verdict = self._verdict(now)
            if verdict is not None and not self._leaving.is_set():
                self._end(verdict)

    def _verdict(self, now: float) -> Verdict | None:
        first = self._reports[0]
        if self._lost_since is not None:
            text = f"lost contact with {first}"
            return Verdict(text) if now - self._lost_since > LEAVING_SECONDS else None
        exited = [report for report in self._reports if report.exited]
        if exited:  # not at the regular end, where this process would be leaving too
            self._left_since = self._left_since or now
            text = f"{'; '.join(map(str, exited))}, has ended; its own output says why"
            return Verdict(text) if now - self._left_since > LEAVING_SECONDS else None
        if now - self._heard >= self._hang_detector.seconds:  # the store hangs, and process 0 with it
            return Verdict(f"no report for {self._hang_detector.seconds:.0f} s from {first}", (first,))
        return self._hang_detector.judge(self._reports, now)

    def _end(self, verdict: Verdict) -> None:
        """Report the reason, kill the silent processes that this one may kill, and end."""
        rank = self._world.rank
        waits = f"process {rank} is at {self._world.activity}; the run ends"
        text = f"error: {verdict.text}; {waits}; start it again to resume from the last checkpoint"
        silent = {report.rank for report in verdict.silent}
        present = [report.rank for report in self._reports if not report.exited and report.rank not in silent]
        if rank == min(present, default=rank):
            tell_terminal(f"\n{text}")
        with suppress(OSError):
            self._logs.mkdir(parents=True, exist_ok=True)
        with suppress(OSError), log_file(self._logs, rank).open("a") as file:
            file.write(f"{text}\nStack traces of process {rank}:\n")
            faulthandler.dump_traceback(file)
        for report in verdict.silent:
            if (report.host, report.launcher) == (self._own.host, self._own.launcher):
                with suppress(OSError):
                    os.kill(report.pid, signal.SIGKILL)
        if self._world.is_main:
            time.sleep(3 * self._interval)  # until the others, which need its store, have found the same reason
        os._exit(HUNG)


def _open_store(world: World) -> Store:
    """Open a separate store on a free port of process 0's node; in memory for a single process."""
    if world.size == 1:
        return HashStore()
    host, timeout = os.environ["MASTER_ADDR"], timedelta(seconds=60)
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout) if world.is_main else None
    port = world.broadcast(store.port if store else None)
    return store or TCPStore(host, port or 0, is_master=False, wait_for_workers=False, timeout=timeout)
