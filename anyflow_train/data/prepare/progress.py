"""Progress of `anyflow prepare`: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

from anyflow_train.data.prepare.workers import Workers

LINE_SECONDS = 10.0


class ClipProgress:
    """Counter of the clips of all processes. Process 0 shows count, rate and remaining time on stderr."""

    def __init__(self, task: str, total: int, workers: Workers) -> None:
        self._task = task
        self._total = total
        self._workers = workers
        self._mine = self._done = 0
        self._start = self._last_line = time.monotonic()
        visible = workers.is_main and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=task, unit="clip") if visible else None

    def __enter__(self) -> ClipProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._done and self._workers.is_main:
            self._print_line()

    def advance(self, count: int) -> None:
        """Count `count` more clips of this process."""
        self._mine += count
        self._show(self._workers.count(self._task, self._mine))

    def finish(self) -> None:
        """Mark this process's share as done. Process 0 waits for the others."""
        self._workers.finish(self._task, self._show)

    def _show(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(done - self._done)
        self._done = done
        late = time.monotonic() - self._last_line > LINE_SECONDS
        if self._bar is None and late and self._workers.is_main:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        rate = self._done / max(self._last_line - self._start, 1e-6)
        left = tqdm.format_interval((self._total - self._done) / max(rate, 1e-6))
        line = f"{self._task}: {self._done}/{self._total} clips, {rate:.1f} clips/s, {left} left"
        print(line, file=sys.stderr, flush=True)
