"""Turn SIGTERM, SIGINT and SIGUSR1 into a stop request: the loop finishes its step, saves, and ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Schedulers are configured to send SIGUSR1 before they take the machine away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Ctrl-C reaches a process of a launch twice, from the terminal and from the launcher. A second Ctrl-C comes later.
AGAIN_SECONDS = 2.0


class StopRequest:
    """A request to stop the run. `signal` is the signal that was received; None if there was none."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._again_seconds = AGAIN_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self._owner = os.getpid()

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal. The first one is stored; a later Ctrl-C ends the process immediately."""
        if os.getpid() != self._owner:
            return  # in a forked data worker: the main process decides
        if self.signal is not None:
            if number != signal.SIGINT or time.monotonic() - self._since < self._again_seconds:
                return
            os.write(2, b"\nstopped immediately; the last checkpoint is intact\n")
            os._exit(130)
        self.signal, self._since = signal.Signals(number), time.monotonic()
        text = f"\n{self.signal.name}: finishing this step and saving; press Ctrl-C again to stop immediately\n"
        os.write(2, text.encode())


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handle stop signals inside the block, and restore the previous handlers after it."""
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in STOP_SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
