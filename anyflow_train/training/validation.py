"""The interface between the trainer and validation. The implementation is in `evaluation`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from anyflow_train.flow.types import FlowMap


@dataclass(frozen=True)
class Validation:
    """Results of one validation: numbers by name, and mp4 files by caption."""

    metrics: dict[str, float]
    videos: dict[str, Path] = field(default_factory=dict)


class Validator(Protocol):
    """Evaluates a student from fixed noise."""

    def __call__(self, student: FlowMap, folder: Path, interrupted: Callable[[], bool]) -> Validation | None:
        """Sample, measure, and write videos into `folder`. Returns None as soon as `interrupted` returns True."""
        ...
