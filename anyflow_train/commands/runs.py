"""`anyflow runs FOLDER`: a table of the runs in a folder; with `prune=true`, delete what is not needed any more."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow_train.config.commands import RunsConfig
from anyflow_train.errors import UserError
from anyflow_train.files import json_lines, read_object
from anyflow_train.text import GIB, markdown_table, printable
from anyflow_train.training.checkpoints.state import list_checkpoints, step_of


@dataclass(frozen=True)
class RunState:
    """State of a run, as its directory tells it.

    Attributes:
        folder: the run directory.
        state: running, finished or stopped.
        step, steps: steps done, and steps of the whole run; None if the files do not say.
        quality: name and value of the best metric's last measurement; empty without a validation.
        bytes: size on disk.
    """

    folder: Path
    state: str
    step: int | None
    steps: int | None
    quality: str
    bytes: int


def run(config: RunsConfig) -> None:
    """Print one row per run, and delete files if `prune` is set.

    Raises:
        UserError: the folder does not exist or contains no run.
    """
    root = Path(config.folder).expanduser()
    found = find_runs(root)
    if not found:
        raise UserError("folder", f"'{config.folder}' contains no run; name the folder of your runs, such as runs")
    states = [read_state(folder) for folder in found]
    rows = [["run", "state", "step", "quality", "size"]]
    for one in states:
        name = one.folder.relative_to(root).as_posix() if one.folder != root else one.folder.name
        shown = "" if one.step is None else f"{one.step}/{one.steps or '?'}"
        rows.append([printable(name), one.state, shown, one.quality, f"{one.bytes / GIB:.2f} GiB"])
    print("\n".join(markdown_table(rows)))
    needless = [path for one in states if one.state != "running" for path in unneeded(one.folder, found)]
    total = sum(map(_size, needless))
    if needless and not config.prune:
        print(f"{total / GIB:.2f} GiB are not needed to resume or to export; prune=true shows and deletes them")
    for path in needless if config.prune else ():
        print(f"deleting {printable(str(path))} ({_size(path) / GIB:.2f} GiB)")
        shutil.rmtree(path)
    if config.prune:
        print(f"deleted {len(needless)} folders, {total / GIB:.2f} GiB")


def find_runs(root: Path) -> list[Path]:
    """List the run directories in a folder and in its sweeps, by name; the folder itself if it is a run.

    Raises:
        UserError: the folder does not exist.
    """
    if not root.is_dir():
        raise UserError(str(root), "is not a folder")
    places = [root, *sorted(root.glob("*/")), *sorted(root.glob("*/*/"))]
    return [place for place in places if (place / "config.json").is_file() and (place / "lock").is_file()]


def read_state(folder: Path) -> RunState:
    """Read the state of a run from its directory. Damaged files count as missing."""
    config, done = read_object(folder / "config.json"), read_object(folder / "done.json")
    step, quality, metric = done.get("step"), "", key_of(config, "evaluation", "best_metric")
    for row in json_lines(folder / "metrics.jsonl"):
        step = row.get("step", step) if not done else step
        value = row.get(f"validation/{metric}")
        quality = quality if value is None else f"{metric} {value:.3g}"
    state = "running" if is_locked(folder) else "finished" if done else "stopped"
    return RunState(folder, state, step, config.get("steps"), quality, _size(folder))


def is_locked(folder: Path) -> bool:
    """Whether a process holds the run's lock. Processes of other nodes are seen if the file system shares locks."""
    with suppress(OSError), open(folder / "lock", "rb") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def unneeded(folder: Path, runs: Iterable[Path]) -> Iterator[Path]:
    """Iterate over the folders of a run that are needed neither to resume nor to export.

    Needed are the last and the best checkpoint, the milestones of `checkpoint.keep_every`, and the checkpoints that
    other runs started from.
    """
    found = list_checkpoints(folder / "checkpoints")
    checkpoints = [path for path in found if not path.is_symlink()]  # a run makes no links
    last = checkpoints[-1] if checkpoints else folder
    every = key_of(read_object(folder / "config.json") or read_object(last / "config.json"), "checkpoint", "keep_every")
    best = read_object(folder / "checkpoints" / "best")
    best = best or key_of(read_object(last / "state.json"), "state", "best") or {}
    steps = {path.name: step_of(path) for path in checkpoints}
    kept = {name for name, step in steps.items() if step == best.get("step") or (every and step % every == 0)}
    kept.add(last.name)
    used = {source for run in runs for source in _sources(read_object(run / "config.json"))}
    for path in checkpoints:
        if path.name not in kept and os.path.realpath(path) not in used:
            yield path
    for pattern in ("checkpoints/damaged_*", "checkpoints/.step_*.tmp", "wandb/replaced-*", "profile"):
        yield from sorted(path for path in folder.glob(pattern) if path.is_dir() and not path.is_symlink())


def key_of(content: Mapping[str, Any], group: str, key: str) -> Any:
    """Read a key of a group; None if there is no such group or key."""
    found = content.get(group)
    return found.get(key) if isinstance(found, Mapping) else None


def _sources(config: Any) -> Iterator[str]:
    """Iterate over all texts of a config that may be paths of checkpoints."""
    if isinstance(config, dict):
        for value in config.values():
            yield from _sources(value)
    elif isinstance(config, str) and "step_" in config:
        yield os.path.realpath(Path(config).expanduser())


def _size(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
