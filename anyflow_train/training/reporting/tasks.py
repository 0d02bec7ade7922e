"""Show how far a command is that is not a training run: `clips`, `evaluate`, `export`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from anyflow_train.config.base import Log
from anyflow_train.text import fit_terminal
from anyflow_train.training.reporting.progress import choose_screen, surviving

ON_A_TERMINAL, AS_LINES = 0.5, 10.0
"""Seconds between two updates."""


class TaskProgress:
    """Shows the share of a command's work that is done, and the time left. Use it as a context manager.

    Args:
        name: what the command does, such as `clips`.
        total: amount of work, in any unit.
        log: `auto` (a bar on a terminal, plain lines elsewhere), `plain`, or `json` (one object per line).
    """

    def __init__(self, name: str, total: int, log: Log = "auto") -> None:
        self._name, self._total, self._done = name, total, 0
        self._screen, self._on_terminal = choose_screen(total, 0, log, name)
        self._begun = self._shown = time.monotonic()
        self._result = self._screen.say if log == "json" else lambda text: print(fit_terminal(text), flush=True)
        self.phase(name)

    def __enter__(self) -> TaskProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.close()

    def phase(self, name: str) -> None:
        """Show what the command does now."""
        self._screen.phase(name)

    @contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """Show what the command does inside the block instead of its main work."""
        self.phase(name)
        yield
        self.phase(self._name)

    def advance(self, amount: int = 1) -> None:
        """Count work that is done."""
        self._done += amount
        now = time.monotonic()
        self._screen.advance(self._done)
        complete = self._on_terminal and self._done >= self._total
        if complete or now - self._shown >= (ON_A_TERMINAL if self._on_terminal else AS_LINES):
            self._shown = now
            left = (now - self._begun) / self._done * (self._total - self._done)
            self._screen.numbers(self._done, {}, max(left, 0.0))

    def say(self, text: str) -> None:
        """Show a line. It is never wrapped."""
        self._screen.say(text)

    def result(self, text: str) -> None:
        """Show a result, after the end of the block. It goes to stdout even if the bar was on stderr."""
        with surviving():
            self._result(text)

    def say_timed(self, text: str) -> None:
        """Show a line that starts with the seconds since the start."""
        self.say(f"[{time.monotonic() - self._begun:6.1f} s] {text}")
