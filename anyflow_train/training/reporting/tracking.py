"""Record metrics and videos: always in `metrics.jsonl`, and in the tracker of the config if there is one."""

from __future__ import annotations

import json
import math
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from PIL import Image

from anyflow_train.config.run import RunConfig, TensorboardTracker, WandbTracker
from anyflow_train.errors import reason_of
from anyflow_train.files import parse_json, regular, replace_file
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.reporting.notify import Notifier

FINISH_SECONDS = 300.0
"""Longest time that a finished run waits for wandb's uploads."""


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


def has_key() -> bool:
    """Whether wandb has credentials. They are not sent anywhere."""
    import wandb

    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.Error:
        return False


class Wandb:
    """Weights & Biases. The run id is stored in the run directory, so that a resumed run continues its curves.

    If there is no connection, the data are kept in an offline folder. It always holds the whole run, read from the
    metrics file, so that a resumed run is uploaded as one.
    """

    def __init__(self, config: WandbTracker, run: RunConfig, directory: RunDirectory) -> None:
        import wandb

        self._wandb, self._directory, self._id = wandb, directory, _wandb_id(directory.path)
        self._options: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "name": run.name,
            "id": self._id,
            "dir": str(directory.path),
            "config": run.model_dump(mode="json"),
        }
        self._upload: str | None = None
        if config.mode == "offline":
            self._start_offline()
            return
        try:
            # without the timeout, a server that is down would keep the finished run waiting
            settings = wandb.Settings(finish_timeout=FINISH_SECONDS)
            self._run = wandb.init(mode="online", resume="allow", settings=settings, **self._options)
        except Exception as error:  # of many types, some of them not wandb's
            self._lose_connection(error)

    def log(self, step: int, values: Mapping[str, float], videos: Mapping[str, Path]) -> None:
        try:
            self._log(step, values, videos)
        except Exception as error:
            if self._upload is not None:
                raise
            self._lose_connection(error)

    def close(self) -> None:
        self._run.finish()
        if self._upload is not None:
            print(f"wandb: this run is not uploaded; upload it with: {self._upload}")

    def _log(self, step: int, values: Mapping[str, float], videos: Mapping[str, Path]) -> None:
        media = {f"videos/{caption}": self._wandb.Video(str(path), format="mp4") for caption, path in videos.items()}
        self._run.log({**{grouped(name): value for name, value in values.items()}, **media}, step=step)

    def _lose_connection(self, error: Exception) -> None:
        self._start_offline()
        _warn(f"wandb is not online ({reason_of(error)}); the data are kept on disk; upload them later: {self._upload}")

    def _start_offline(self) -> None:
        """Begin an offline folder, and repeat in it what the run has logged so far. Earlier ones are renamed."""
        for earlier in (self._directory.path / "wandb").glob(f"offline-run-*-{self._id}"):
            earlier.rename(earlier.with_name(f"replaced-{earlier.name}"))
        self._run = self._wandb.init(mode="offline", reinit="finish_previous", **self._options)
        self._upload = f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"
        for row in map(parse_json, _lines_until(self._directory.metrics)):
            step = row.pop("step")
            grid = self._directory.validation(step) / "grid.mp4"
            validated = any(name.startswith("validation/") for name in row) and grid.is_file()
            self._log(step, row, {"grid": grid} if validated else {})


class Tensorboard:
    """TensorBoard event files in the run directory, with the config as a text and videos as GIFs."""

    def __init__(self, directory: RunDirectory, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # a resumed run repeats some steps; `purge_step` hides what the interrupted run logged for them
        self._writer = SummaryWriter(str(directory.path / "tensorboard"), purge_step=step + 1 if step else None)
        self._writer.add_text("config", f"```json\n{json.dumps(directory.read_config(), indent=2)}\n```", step)

    def log(self, step: int, values: Mapping[str, float], videos: Mapping[str, Path]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(grouped(name), value, step)
        for caption, path in videos.items():
            self._show(f"videos/{caption}", path.with_suffix(".gif"), step)

    def close(self) -> None:
        self._writer.close()

    def _show(self, tag: str, path: Path, step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        with Image.open(path) as picture:
            width, height = picture.size
        image = Summary.Image(encoded_image_string=path.read_bytes(), width=width, height=height, colorspace=3)
        assert self._writer.file_writer is not None  # it exists until `close`
        self._writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def grouped(name: str) -> str:
    """Return the name under which trackers show a number: those of the student's steps are in the group `train`."""
    return name if "/" in name else f"train/{name}"


class Trackers:
    """All trackers of a run. Without a directory there are none, because only one process records the run."""

    def __init__(self, config: RunConfig, directory: RunDirectory | None, step: int) -> None:
        self._sinks: list[Tracker] = []
        if directory is None:
            return
        begin: list[Callable[[], Tracker]] = [lambda: MetricsFile(directory.metrics, step)]
        tracker = config.tracker
        if isinstance(tracker, WandbTracker):
            begin.append(lambda: Wandb(tracker, config, directory))
        if isinstance(tracker, TensorboardTracker):
            begin.append(lambda: Tensorboard(directory, step))
        if config.notify:
            begin.append(lambda: Notifier(config))
        for one in begin:
            try:
                self._sinks.append(one())
            except Exception as error:  # of many types: of files, networks and libraries
                _warn(f"cannot start and is left out ({type(error).__name__}: {error})")

    def log(self, step: int, values: Mapping[str, float], videos: Mapping[str, Path] = MappingProxyType({})) -> None:
        """Record numbers, and mp4 files by caption, after `step` steps."""
        for sink in tuple(self._sinks):
            with self._surviving(sink):
                sink.log(step, values, videos)

    def close(self) -> None:
        """Flush and close all trackers."""
        for sink in tuple(self._sinks):
            with self._surviving(sink):
                sink.close()

    @contextmanager
    def _surviving(self, sink: Tracker) -> Iterator[None]:
        """Leave a tracker out after an error, with a warning: it must not end the run."""
        try:
            yield
        except Exception as error:
            self._sinks.remove(sink)
            _warn(f"{type(sink).__name__} failed and is left out ({type(error).__name__}: {error})")


def _warn(problem: str) -> None:
    print(f"warning: tracker: {problem}", file=sys.stderr)


def _lines_until(path: Path, step: float = math.inf) -> list[str]:
    """Read the lines of steps up to `step`. Damaged lines, such as that of a killed process, are dropped too."""
    kept = []
    for line in regular(path).read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError):
            if parse_json(line)["step"] <= step:
                kept.append(f"{line}\n")
    return kept


def _wandb_id(path: Path) -> str:
    """Read the run's id from the run directory; the first start creates it."""
    file = path / "wandb_id"
    if not file.exists():
        replace_file(file, secrets.token_hex(4).encode())
    return file.read_text()
