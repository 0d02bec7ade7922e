"""SIGTERM, SIGINT and SIGUSR1 as a request: the loop finishes its step, saves, and ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGUSR1 is how a scheduler is told to announce that it will take the machine away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Ctrl-C reaches a process of a launch twice, from the terminal and from the launcher. A person's second takes longer.
AGAIN_SECONDS = 2.0


class StopRequest:
    """Whether someone asked the run to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._again_seconds = AGAIN_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self._owner = os.getpid()

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler. The first request is noted; a later Ctrl-C ends the process at once."""
        if os.getpid() != self._owner:
            return  # a forked data worker: the run's own process decides
        if self.signal is not None:
            if number != signal.SIGINT or time.monotonic() - self._since < self._again_seconds:
                return
            os.write(2, b"\nstopped at once; the last checkpoint is intact\n")
            os._exit(130)
        self.signal, self._since = signal.Signals(number), time.monotonic()
        text = f"\n{self.signal.name}: finishing this step and saving; Ctrl-C again to stop at once\n"
        os.write(2, text.encode())


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Listen for stop signals inside the block; the handlers from before come back after it."""
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
