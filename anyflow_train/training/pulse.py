"""What a process's main thread is at, for the threads that watch it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Pulse:
    """Where a process's main thread is.

    Attributes:
        step: steps done.
        doing: what it is at, in words.
        moves: how often it went on to something else. All processes of a run go the same way, so the one with the
            fewest moves is behind, and the others wait for it.
        long: it is at something that may take any time, such as loading a model.
    """

    step: int = 0
    doing: str = "starting"
    moves: int = 0
    long: bool = True

    def move(self) -> None:
        """One thing further: called before every wait for other processes."""
        self.moves += 1

    def at(self, doing: str, step: int) -> None:
        """Begin something that must not take longer than `engine.timeout_seconds`."""
        self.step, self.doing, self.long = step, doing, False
        self.moves += 1

    def take_time(self, doing: str) -> None:
        """Begin something that may take any time."""
        self.doing, self.long = doing, True
        self.moves += 1

    @contextmanager
    def at_length(self, doing: str) -> Iterator[None]:
        """Do something that may take any time."""
        before = self.doing, self.long
        self.take_time(doing)
        try:
            yield
        finally:
            self.doing, self.long = before
            self.moves += 1

    def along(self, things: Iterable[T]) -> Iterator[T]:
        """The same things; each is a move."""
        for thing in things:
            self.moves += 1
            yield thing
