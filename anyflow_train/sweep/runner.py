"""Start the runs of a sweep, several at a time, and pass signals on to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from types import FrameType

from anyflow_train.sweep.combinations import Combination

STOP_SECONDS = 2.0
"""Time between two questions whether a run shall end early."""


class Runner:
    """Starts runs. A signal stops the current runs cleanly and ends the sweep.

    Args:
        options: options of every command, such as `--config-dir`.
        jobs: runs at a time. With more than one, the output of each goes to `<run directory>.log`.
        gpus: names of GPUs, each of which one run has for itself; empty leaves them to the runs.
    """

    def __init__(self, options: Sequence[str], jobs: int, gpus: Sequence[str] = ()) -> None:
        self.options = options
        self.jobs = jobs
        self._free = list(gpus)
        self._processes: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def finish_all(self, combinations: Sequence[Combination], report: Callable[[], object]) -> None:
        """Run combinations to their end; those that are finished already are skipped.

        Args:
            report: called after each run.
        """
        with ThreadPoolExecutor(self.jobs) as pool:
            tasks = [
                pool.submit(self._finish, one, f"{n}/{len(combinations)}") for n, one in enumerate(combinations, 1)
            ]
            for task in as_completed(tasks):
                task.result()
                report()

    @contextmanager
    def forwarding(self, *signals: int) -> Iterator[None]:
        """Forward signals to the current runs while the block runs."""
        with ExitStack() as stack:
            for number in signals:
                stack.callback(signal.signal, number, signal.signal(number, self._forward))
            yield

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        """Forward a signal to the current runs, which finish their step and save."""
        self.stopped = True
        for process in tuple(self._processes):
            process.send_signal(number)  # does nothing if the run has ended

    def _finish(self, combination: Combination, place: str) -> None:
        if self.stopped:
            return
        if combination.state == "finished":
            print(f"== {place} {combination.label}: already finished\n", end="", flush=True)
            return
        # In one piece, so that the lines of runs that start at the same time do not mix.
        print(f"== {place} {combination.label}\n", end="", flush=True)
        code, seconds = self.call(["train", *combination.overrides], combination)
        combination.cpu_seconds += seconds
        combination.update("stopped" if code == 0 or self.stopped else "failed")
        if combination.state == "failed":
            print(f"{combination.label} failed with exit code {code}", file=sys.stderr, flush=True)
        self.stopped |= combination.state == "stopped"

    def call(
        self,
        arguments: Sequence[str],
        logged: Combination | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> tuple[int, float]:
        """Run one command. Returns its exit code and the CPU seconds of its processes.

        Args:
            arguments: command and its arguments.
            logged: run that the command trains. It sees one of the free GPUs alone, if there are any.
            stop: asked every few seconds; once it returns True, the command is told to end.
        """
        with ExitStack() as stack:
            output = None
            if logged is not None and self.jobs > 1:
                logged.folder.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(logged.folder.with_name(f"{logged.label}.log").open("ab"))
            command = [sys.executable, "-m", "anyflow_train", *arguments, *self.options]
            # In its own session, so that Ctrl-C reaches the run only once, through this process.
            environment = {**os.environ}
            if logged is not None and self._free:
                environment["CUDA_VISIBLE_DEVICES"] = gpu = self._free.pop()
                stack.callback(self._free.append, gpu)
            process = subprocess.Popen(command, start_new_session=True, stdout=output, stderr=output, env=environment)
            self._processes.add(process)
            if self.stopped:  # a signal arrived while the run was being started
                process.terminate()
            ended, status, usage = os.wait4(process.pid, 0 if stop is None else os.WNOHANG)
            while not ended:
                time.sleep(STOP_SECONDS)
                if stop is not None and stop():
                    process.terminate()
                    stop = None
                ended, status, usage = os.wait4(process.pid, 0 if stop is None else os.WNOHANG)
            process.returncode = os.waitstatus_to_exitcode(status)
            self._processes.discard(process)
            return process.returncode, usage.ru_utime + usage.ru_stime
