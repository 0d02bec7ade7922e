"""Figures of one part of `anyflow bench`, kept on the disk while it runs."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class Notes:
    """Figures that a part has found so far.

    They are on the disk after each figure, so that a part that crashes or is killed loses none of them.

    Args:
        file: JSON file that is written after every figure.
        seconds: time that the part has.
    """

    def __init__(self, file: Path, seconds: float) -> None:
        self._file, self._end = file, time.monotonic() + seconds
        self._found: dict[str, Any] = {}
        self._wrong: list[str] = []

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()

    def add(self, **figures: Any) -> None:
        """Keep figures by name. A later figure of the same name replaces the earlier one."""
        self._found |= figures
        partial = self._file.with_suffix(".partial")
        partial.write_text(json.dumps(self._found))
        partial.replace(self._file)
        print(*(f"{name}: {value}" for name, value in figures.items()), sep="\n", flush=True)

    def check(self, name: str, difference: float, limit: float) -> None:
        """Keep a relative difference that must not exceed a limit."""
        self.add(**{name: f"{difference:.1e}"})
        if not difference <= limit:  # also if it is not a number
            self._wrong.append(f"{name}: {difference:.1e} instead of at most {limit:.0e}")
            self.add(wrong="; ".join(self._wrong))
