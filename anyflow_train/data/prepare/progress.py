"""Progress of `anyflow prepare`: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager

from tqdm import tqdm

from anyflow_train.data.prepare.workers import Workers

LINE_SECONDS = 10.0


class ClipProgress(AbstractContextManager["ClipProgress"]):
    """Counter of the clips of all processes. Process 0 shows count, skipped clips, rate and remaining time on stderr.

    Args:
        task: name of the work, as shown.
        total: clips of the whole work.
        workers: all processes.
        done: clips that an earlier job has done.
        number: number of the round, which keeps its counts apart from those of other rounds.
    """

    def __init__(self, task: str, total: int, workers: Workers, done: int = 0, number: int = 0) -> None:
        self._task, self._total, self._workers = task, total, workers
        self._before = self._done = done
        self._skipped = 0
        self._name = f"round {number} {task}"
        self._start = self._last_line = time.monotonic()
        # `disable=None` shows the bar only on a terminal.
        hidden = None if workers.is_main else True
        self._bar = tqdm(total=total, initial=done, desc=task, unit="clip", disable=hidden)

    def __exit__(self, *error: object) -> None:
        self._bar.close()
        if self._done > self._before:
            self._print_line()

    def advance(self, count: int, skipped: int = 0) -> None:
        """Count clips of this process that are done, and how many of them were skipped.

        Raises:
            UserErrors: on process 0, for errors of other processes.
        """
        self._skipped = self._workers.count(f"{self._name} skipped", skipped)
        before, self._done = self._done, self._before + self._workers.count(self._name, count)
        self._bar.set_postfix_str(f"{self._skipped} skipped" if self._skipped else "", refresh=False)
        self._bar.update(self._done - before)
        if time.monotonic() - self._last_line > LINE_SECONDS:
            self._print_line()

    def finish(self) -> None:
        """Mark this process's share as done. Process 0 waits for the others. Raises UserErrors for their errors."""
        self._workers.await_all(f"{self._name} finished", lambda: self.advance(0))
        self.advance(0)

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        if not (self._bar.disable and self._workers.is_main):
            return
        rate = (self._done - self._before) / max(self._last_line - self._start, 1e-6)
        left = tqdm.format_interval((self._total - self._done) / max(rate, 1e-6))
        skipped = f", {self._skipped} skipped" if self._skipped else ""
        line = f"{self._task}: {self._done}/{self._total} clips{skipped}, {rate:.1f} clips/s, {left} left"
        print(line, file=sys.stderr, flush=True)
