"""The interface between the trainer and validation. The implementation is in `evaluation`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from anyflow_train.flow.types import FlowMap


@dataclass(frozen=True)
class Validation:
    """Results of one validation.

    Attributes:
        metrics: numbers by name.
        videos: mp4 files by caption.
        intervals: ends of the 95 % intervals of metrics, by name of the metric.
    """

    metrics: dict[str, float]
    videos: dict[str, Path] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def summary(self) -> str:
        """Format all numbers in one line, with their intervals: `energy_distance_1 0.51 [0.43, 0.6]`."""
        ends = {name: f" [{low:.2g}, {high:.2g}]" for name, (low, high) in self.intervals.items()}
        return "  ".join(f"{name} {value:.3g}{ends.get(name, '')}" for name, value in self.metrics.items())

    def tracked(self) -> dict[str, float]:
        """Name all numbers for trackers; the ends of intervals are called `<metric>_low` and `<metric>_high`."""
        ends = {
            f"{name}_{end}": value
            for name, interval in self.intervals.items()
            for end, value in zip(("low", "high"), interval, strict=True)
        }
        return {f"validation/{name}": value for name, value in (self.metrics | ends).items()}


class Validator(Protocol):
    """Evaluates a student from fixed noise."""

    def __call__(self, student: FlowMap, folder: Path, interrupted: Callable[[], bool]) -> Validation | None:
        """Sample, measure, and write videos into `folder`. Returns None as soon as `interrupted` returns True."""
        ...
