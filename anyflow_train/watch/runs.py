"""Reads run directories for the page of `anyflow watch`: states, numbers by step, configs, and videos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from anyflow_train.commands.runs import find_runs, is_locked, key_of
from anyflow_train.config.keys import flatten
from anyflow_train.errors import UserError
from anyflow_train.files import inside, read_object, regular
from anyflow_train.training.checkpoints.state import CHECKPOINT, checkpoint_name, step_of
from anyflow_train.watch.metrics import VALIDATION, Metrics

POINTS = 12_000
"""Number of rows that all runs together may show at first."""
MOST_PER_RUN, FEWEST_PER_RUN = 2000, 200
REPORTS = ("report", "evaluation")
"""Folders next to a run that may hold the report of an evaluation."""


@dataclass
class WatchedRun:
    """One run of a page.

    Attributes:
        folder: the run directory.
        metrics: reader of its rows.
        rows: rows with serial numbers. One counter numbers the rows of all runs.
    """

    folder: Path
    metrics: Metrics
    rows: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        """Return the state, the steps done and wanted, the seconds left, and warnings."""
        config, done = read_changed(self.folder / "config.json"), read_changed(self.folder / "done.json")
        latest: dict[str, Any] = {}
        for _, row in self.rows[-50:]:
            latest |= row
        steps, step, seconds = config.get("steps"), latest.get("step", 0), latest.get("seconds_per_step")
        state = "running" if is_locked(self.folder) else "finished" if done else "stopped"
        left = None
        if state == "running" and isinstance(steps, int) and isinstance(seconds, int | float):
            left = (steps - step) * seconds
        warnings = list(self._warnings(latest))
        return {"state": state, "step": step, "steps": steps, "seconds_left": left, "warnings": warnings}

    def config(self) -> dict[str, Any]:
        """Return the config, by dotted key."""
        return flatten(read_changed(self.folder / "config.json"))

    def videos(self) -> list[int]:
        """Steps of the validations that have a video."""
        folders = (path.parent for path in (self.folder / "validation").glob("step_*/grid.mp4"))
        return sorted(step_of(folder) for folder in folders if CHECKPOINT.fullmatch(folder.name))

    def video(self, step: int) -> Path:
        """Return the file of a validation's video. Raises OSError if it is missing or leads out of the run."""
        return regular(inside(self.folder, f"validation/{checkpoint_name(step)}/grid.mp4"))

    def teacher(self) -> dict[int, list[float]]:
        """Return the teacher's energy distance by number of calls, from an evaluation near the run."""
        for name in REPORTS:
            with suppress(AttributeError, LookupError, TypeError):  # a file of this name may be another program's
                cells = read_changed(self.folder.parent / name / "report.json")["cells"]
                taught = {cell["steps"]: cell["energy_distance"] for cell in cells if cell["model"] == "teacher"}
                if found := {calls: [one["value"], one["low"], one["high"]] for calls, one in taught.items()}:
                    return found
        return {}

    def _warnings(self, latest: Mapping[str, Any]) -> Sequence[str]:
        found = []
        if skipped := latest.get("skipped"):
            found.append(f"{skipped:.0f} steps were skipped, because a loss or gradient was not finite")
        found += [f"a checkpoint is damaged: {path.name}" for path in self.folder.glob("checkpoints/damaged_*")]
        return found


class Watch:
    """All runs of a folder.

    Args:
        root: folder of runs and sweeps, or one run.

    Raises:
        UserError: the folder does not exist or contains no run.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.runs = root.expanduser(), dict[str, WatchedRun]()
        self._serial = 0
        if not find_runs(self.root):
            raise UserError(str(root), "contains no run; name the folder of your runs, such as runs")

    def refresh(self) -> None:
        """Find new runs, and read new rows."""
        found = find_runs(self.root)
        points = min(max(POINTS // max(len(found), 1), FEWEST_PER_RUN), MOST_PER_RUN)
        for folder in found:
            name = folder.relative_to(self.root).as_posix() if folder != self.root else folder.resolve().name
            if name not in self.runs:
                every = key_of(read_object(folder / "config.json"), "evaluation", "every") or 0
                self.runs[name] = WatchedRun(folder, Metrics(folder / "metrics.jsonl", points, every))
        for run in self.runs.values():
            for row in run.metrics.read():
                self._serial += 1
                run.rows.append((self._serial, row))
            if len(run.rows) > 2 * MOST_PER_RUN:
                run.rows = [pair for place, pair in enumerate(run.rows) if place % 2 or is_validation(pair[1])]

    def state(self, after: int = 0) -> dict[str, Any]:
        """Return everything that a page shows, with the rows after a serial number."""
        self.refresh()
        runs = {}
        for name, run in self.runs.items():
            rows = [row for serial, row in run.rows if serial > after]
            runs[name] = {**run.facts(), "rows": rows, "videos": run.videos(), "teacher": run.teacher()}
        return {
            "serial": self._serial,
            "runs": runs,
            "differences": differences({n: r.config() for n, r in self.runs.items()}),
        }


def read_changed(path: Path) -> Mapping[str, Any]:
    """Read a JSON object, as `read_object` does. A file that has not changed since is not read again."""
    with suppress(OSError):
        return _read(path, path.stat().st_mtime_ns)
    return {}


@lru_cache(maxsize=1024)
def _read(path: Path, _changed: int) -> Mapping[str, Any]:
    return read_object(path)


def is_validation(row: Mapping[str, Any]) -> bool:
    """Whether a row holds the numbers of a validation."""
    return any(name.startswith(VALIDATION) for name in row)


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """Find the keys in which configs differ. Returns the value of each run as JSON, by key and run."""
    keys = sorted({key for config in configs.values() for key in config} - {"name", "out", "format"})
    texts = {key: {name: json.dumps(config.get(key)) for name, config in configs.items()} for key in keys}
    return {key: values for key, values in texts.items() if len(set(values.values())) > 1}
