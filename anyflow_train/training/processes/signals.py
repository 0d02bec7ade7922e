"""Turn SIGTERM, SIGINT, SIGHUP and SIGUSR1 into a stop request: the loop finishes its step, saves, and ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from anyflow_train.training.processes import launched

# Schedulers are configured to send SIGUSR1 before they take the machine away. A closed ssh session sends SIGHUP.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# Ctrl-C reaches a process of a launch twice, from the terminal and from the launcher. A second Ctrl-C comes later.
AGAIN_SECONDS = 2.0


# Time that threads have to end after a wait for them was interrupted.
ENDING_SECONDS = 5.0


class WaitInterrupted(Exception):
    """A stop signal arrived while the process waited, with `StopRequest.interrupting`."""


class StopRequest:
    """A request to stop the run. `signal` is the signal that was received; None if there was none."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._again_seconds = AGAIN_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        self._owner = os.getpid()
        self._waiting = self._interrupted = False
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal. The first one is stored; a later Ctrl-C ends the process immediately."""
        if os.getpid() != self._owner:
            return  # in a forked data worker: the main process decides
        if self.signal is not None:
            if number != signal.SIGINT or time.monotonic() - self._since < self._again_seconds:
                return
            with suppress(OSError):
                os.write(2, b"\nstopped immediately; the last checkpoint is intact\n")
            os._exit(130)
        self.signal, self._since = signal.Signals(number), time.monotonic()
        text = f"\n{self.signal.name}: finishing this step and saving; press Ctrl-C again to stop immediately\n"
        with suppress(OSError):
            os.write(2, text.encode())
        if self.signal is signal.SIGHUP:
            self._leave_terminals()
        if self._waiting:
            self._interrupted = True
            raise WaitInterrupted

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a stop signal raise WaitInterrupted inside the block, which may otherwise wait forever."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    def end_soon(self) -> None:
        """After an interrupted wait, end the process in `ENDING_SECONDS`, because a thread may never end."""
        if self._interrupted:
            timer = threading.Timer(ENDING_SECONDS, self._end)
            timer.daemon = True
            timer.start()

    def _end(self) -> None:
        code = launched.PREEMPTED if self.signal is signal.SIGUSR1 else 0
        os._exit(launched.record_exit_code(code, everywhere=True))

    def _leave_terminals(self) -> None:
        """Send further output to nowhere: writing to a closed terminal would end the run before it has saved."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Handle stop signals inside the block, and restore the previous handlers after it. nohup ignores SIGHUP."""
    request = StopRequest()
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, request.receive) for number in STOP_SIGNALS if number not in ignored}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
