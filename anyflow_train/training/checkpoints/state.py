"""What a run is beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest value of `evaluation.best_metric` so far."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class TrainState:
    """All that resume needs beside the tensors: every random draw is a function of (seed, step, position, purpose).

    Attributes:
        step: steps done, skipped ones included.
        samples_seen: training samples consumed.
        data_position: the next sample's place in the endless stream of epochs.
        skipped: steps skipped because a loss or gradient was not finite; skipped_in_row of them were the last ones.
        seconds: time spent so far, over all starts of the run.
        last_loss: of the last applied step.
        metrics: the last validation's, which was after `validated` steps.
        best: the best checkpoint so far.
    """

    step: int = 0
    samples_seen: int = 0
    data_position: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    seconds: float = 0.0
    last_loss: float | None = None
    metrics: dict[str, float] | None = None
    validated: int = 0
    best: Best | None = None
