"""The interface between the trainer and validation. The implementation is in `evaluation`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from anyflow_train.flow.types import FlowMap

ShowPart = Callable[[int, int], None]
"""Shows that part k of n is being done."""


@dataclass(frozen=True)
class Validation:
    """Results of one validation.

    Attributes:
        metrics: numbers by name.
        videos: mp4 files by caption.
        intervals: ends of the 95 % intervals of metrics, named `<metric>_low` and `<metric>_high`.
    """

    metrics: dict[str, float]
    videos: dict[str, Path] = field(default_factory=dict)
    intervals: dict[str, float] = field(default_factory=dict)

    def summary(self) -> str:
        """Format all numbers in one line, with their intervals: `energy_distance_1 0.51 [0.43, 0.6]`."""
        return "  ".join(f"{name} {self.text(name)}" for name in self.metrics)

    def text(self, name: str) -> str:
        """Format one number with its interval: `0.51 [0.43, 0.6]`; empty if it was not measured."""
        low, high = (self.intervals.get(f"{name}_{end}") for end in ("low", "high"))
        interval = "" if low is None or high is None else f" [{low:.2g}, {high:.2g}]"
        return f"{self.metrics[name]:.3g}{interval}" if name in self.metrics else ""


class Validator(Protocol):
    """Evaluates a student from fixed noise."""

    def __call__(
        self, student: FlowMap, folder: Path, interrupted: Callable[[], bool], show: ShowPart
    ) -> Validation | None:
        """Sample, measure, and write videos into `folder`. Returns None as soon as `interrupted` returns True."""
        ...
