"""The state of a run, without its tensors, and the names of its checkpoints."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

CHECKPOINT = re.compile(r"step_(\d{8,})")
"""Names of checkpoint folders."""


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest value of `evaluation.best_metric` so far."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class TrainState:
    """Everything that resume needs in addition to the tensors. Random draws depend on (seed, step, position, purpose).

    Attributes:
        step: steps done, including skipped ones.
        samples_seen: training samples consumed.
        data_position: position of the next sample in the endless stream of epochs.
        skipped: steps skipped because a loss or gradient was not finite.
        skipped_in_row: skipped steps since the last applied one.
        seconds: time spent so far, over all starts of the run.
        last_loss: logged loss before this state.
        metrics: metrics of the last validation.
        validated: steps before the last validation.
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


def is_run(source: str | Path) -> bool:
    """Whether a source is a run directory or a checkpoint folder."""
    path = Path(source).expanduser()
    return (path / "checkpoints").is_dir() or (path / "state.json").is_file()


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint, and of the validation, after `step` steps."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Step in the folder name of a checkpoint or a validation."""
    return int(checkpoint.name.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if CHECKPOINT.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)
