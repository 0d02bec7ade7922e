"""What a process's main thread is at, for the threads that watch it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Activity:
    """Where a process's main thread is.

    Attributes:
        step: steps done.
        doing: what it is at, in words.
        changes: how often it went on to something else. All processes of a run go the same way, so the one with the
            fewest moves is behind, and the others wait for it.
        exempt_from_timeout: it is at something that may take any time, such as loading a model.
    """

    step: int = 0
    doing: str = "starting"
    changes: int = 0
    exempt_from_timeout: bool = True

    def touch(self) -> None:
        """One thing further: called before every wait for other processes."""
        self.changes += 1

    def begin(self, doing: str, step: int) -> None:
        """Begin something that must not take longer than `engine.timeout_seconds`."""
        self.step, self.doing, self.exempt_from_timeout = step, doing, False
        self.changes += 1

    def begin_untimed(self, doing: str) -> None:
        """Begin something that may take any time."""
        self.doing, self.exempt_from_timeout = doing, True
        self.changes += 1

    @contextmanager
    def untimed(self, doing: str) -> Iterator[None]:
        """Do something that may take any time."""
        before = self.doing, self.exempt_from_timeout
        self.begin_untimed(doing)
        try:
            yield
        finally:
            self.doing, self.exempt_from_timeout = before
            self.changes += 1

    def touch_each(self, things: Iterable[T]) -> Iterator[T]:
        """The same things; each is a move."""
        for thing in things:
            self.changes += 1
            yield thing
