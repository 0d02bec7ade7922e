"""Record metrics and videos: always in `metrics.jsonl`, and in the tracker of the config if there is one."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from anyflow_train.config.run import RunConfig, TensorboardTracker, WandbTracker
from anyflow_train.files import replace_file
from anyflow_train.training.checkpoints.run_directory import RunDirectory


class Tracker(Protocol):
    """Records numbers and videos by step."""

    def log(self, step: int, values: Mapping[str, float], videos: Mapping[str, Path]) -> None:
        """Record numbers by name, and mp4 files by caption."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class MetricsFile:
    """One JSON object per line; videos are in the run directory. Drops the steps that a resumed run repeats."""

    def __init__(self, path: Path, step: int) -> None:
        if path.exists():
            replace_file(path, "".join(_lines_until(path, step)).encode())
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float], videos: Mapping[str, Path]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Wandb:
    """Weights & Biases. The run id is stored in the run directory, so that a resumed run continues its curves."""

    def __init__(self, config: WandbTracker, run: RunConfig, directory: RunDirectory) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            name=run.name,
            id=_wandb_id(directory.path),
            resume="allow" if config.mode == "online" else None,
            dir=str(directory.path),
            config=run.model_dump(mode="json"),
        )

    def log(self, step: int, values: Mapping[str, float], videos: Mapping[str, Path]) -> None:
        media = {f"videos/{caption}": self._wandb.Video(str(path), format="mp4") for caption, path in videos.items()}
        self._run.log({**values, **media}, step=step)

    def close(self) -> None:
        self._run.finish()


class Tensorboard:
    """TensorBoard event files in the run directory. Videos are logged by path: the format only supports GIFs."""

    def __init__(self, directory: RunDirectory, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # a resumed run repeats some steps; `purge_step` hides what the interrupted run logged for them
        self._writer = SummaryWriter(str(directory.path / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float], videos: Mapping[str, Path]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        for caption, path in videos.items():
            self._writer.add_text(f"videos/{caption}", str(path), step)

    def close(self) -> None:
        self._writer.close()


class Trackers:
    """All trackers of a run. Without a directory there are none, because only one process records the run."""

    def __init__(self, config: RunConfig, directory: RunDirectory | None, step: int) -> None:
        self._sinks: list[Tracker] = []
        if directory is None:
            return
        self._sinks.append(MetricsFile(directory.metrics, step))
        if isinstance(config.tracker, WandbTracker):
            self._sinks.append(Wandb(config.tracker, config, directory))
        if isinstance(config.tracker, TensorboardTracker):
            self._sinks.append(Tensorboard(directory, step))

    def log(self, step: int, values: Mapping[str, float], videos: Mapping[str, Path] = MappingProxyType({})) -> None:
        """Record numbers, and mp4 files by caption, after `step` steps."""
        for sink in self._sinks:
            sink.log(step, values, videos)

    def close(self) -> None:
        """Flush and close all trackers."""
        for sink in self._sinks:
            sink.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Read the lines of steps up to `step`. An incomplete line, from a killed process, is dropped too."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line)
    return kept


def _wandb_id(path: Path) -> str:
    """Read the run's id from the run directory; the first start creates it."""
    file = path / "wandb_id"
    if not file.exists():
        replace_file(file, secrets.token_hex(4).encode())
    return file.read_text()
