"""The current activity of a process's main thread, for the heartbeat threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Activity:
    """The current activity of a process's main thread.

    Attributes:
        step: steps done.
        doing: description of the current activity.
        changes: number of activities begun so far. All processes of a run do the same things in the same order, so the
            process with the smallest number is behind, and the others wait for it.
        exempt_from_timeout: whether the activity may take any time, such as loading a model.
    """

    step: int = 0
    doing: str = "starting"
    changes: int = 0
    exempt_from_timeout: bool = True

    def touch(self) -> None:
        """Count a change. Called before every wait for other processes."""
        self.changes += 1

    def begin(self, doing: str, step: int) -> None:
        """Begin an activity that must not take longer than `engine.timeout_seconds`."""
        self.step, self.doing, self.exempt_from_timeout = step, doing, False
        self.changes += 1

    def begin_untimed(self, doing: str) -> None:
        """Begin an activity that may take any time."""
        self.doing, self.exempt_from_timeout = doing, True
        self.changes += 1

    def __str__(self) -> str:
        return f"step {self.step + 1}, {self.doing}"

    @contextmanager
    def untimed(self, doing: str) -> Iterator[None]:
        """Run a block that may take any time."""
        before = self.doing, self.exempt_from_timeout
        self.begin_untimed(doing)
        try:
            yield
        finally:
            self.doing, self.exempt_from_timeout = before
            self.changes += 1
