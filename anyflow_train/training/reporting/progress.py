"""Show the progress of a run: a bar and tables for people, plain lines without a terminal, JSON lines for programs."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from anyflow_train.config.base import Log
from anyflow_train.text import duration
from anyflow_train.training.validation import ShowPart, Validation

SHORT = {
    "gradient_norm": "grad",
    "learning_rate": "lr",
    "samples_per_second": "samples/s",
    "seconds_per_step": "s/step",
}
# Values with this in their name go to the trackers only; a line has no room for them.
HIDDEN = "/rollout_"
TRAINING = "training"
PHASE_WIDTH, BAR_WIDTH = 14, 24
"""Columns of what the run does, and of the bar. With the numbers of steps and the time left it fits into 80 columns."""


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory in GiB: of the GPU if `device` is one, otherwise of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # Linux counts KiB, macOS bytes


class Screen:
    """A way to show progress. This class shows nothing."""

    def start(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show facts about the run that begins."""

    def advance(self, step: int) -> None:
        """Show that `step` steps are done."""

    def numbers(self, step: int, values: Mapping[str, float], left: float) -> None:
        """Show the numbers after `step` steps. `left`: seconds of training that are left."""

    def validated(self, step: int, validation: Validation) -> None:
        """Show the result of a validation."""

    def phase(self, name: str) -> None:
        """Show what the run is doing now."""

    def say(self, text: str) -> None:
        """Show a line."""

    def close(self) -> None:
        """Leave everything as it is."""


class Surviving:
    """A screen that drops what it cannot print: a reader that ended must not end the run."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen

    def __getattr__(self, name: str) -> Any:
        return surviving()(getattr(self._screen, name))


def choose_screen(total: int, done: int, log: Log, unit: str = "step") -> tuple[Surviving, bool]:
    """Choose the screen of `log`, and whether it is a bar on a terminal. `unit` is what plain lines and JSON count."""
    console = Console(stderr=True)
    people = log == "auto" and console.is_terminal and not console.is_dumb_terminal
    screen: Screen = Json(unit) if log == "json" else Bar(console, total, done) if people else Lines(total, unit)
    return Surviving(screen), people


class StepProgress:
    """Shows the progress of a run. The time left is that of training steps alone.

    Args:
        steps: steps of the whole run.
        done: steps done before this start.
        log: `auto` (a bar on a terminal, plain lines elsewhere), `plain`, or `json` (one object per line).
    """

    def __init__(self, steps: int, done: int, log: Log = "auto") -> None:
        self._steps, self._step = steps, done
        self._screen, _ = choose_screen(steps, done, log)

    def start(self, rows: Sequence[tuple[str, str]]) -> None:
        """Show facts about the run that begins: names and values."""
        self._screen.start(rows)

    def advance(self) -> None:
        """Count one step."""
        self._step += 1
        self._screen.advance(self._step)

    def show(self, step: int, values: Mapping[str, float]) -> None:
        """Show the numbers after `step` steps."""
        left = (self._steps - step) * values.get("seconds_per_step", 0.0)
        self._screen.numbers(step, values, left)

    def validated(self, step: int, validation: Validation) -> None:
        """Show the result of a validation after `step` steps."""
        self._screen.validated(step, validation)

    @contextmanager
    def phase(self, name: str) -> Iterator[ShowPart]:
        """Show what the run does inside the block instead of training. Yields a function that shows the part of it."""

        def show(part: int, parts: int) -> None:
            self._screen.phase(f"{name} {part}/{parts}")

        self._screen.phase(name)
        yield show
        self._screen.phase(TRAINING)

    def say(self, text: str) -> None:
        """Show a line above the bar. It is never wrapped."""
        self._screen.say(text)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._screen.close()


class Lines(Screen):
    """Plain lines on stdout."""

    def __init__(self, steps: int, unit: str) -> None:
        self._steps, self._unit = steps, unit

    def start(self, rows: Sequence[tuple[str, str]]) -> None:
        self.say("\n".join(f"{name:<14} {value}" for name, value in rows))

    def numbers(self, step: int, values: Mapping[str, float], left: float) -> None:
        self.say("  ".join([f"{self._unit} {step}/{self._steps}", *numbers(values), f"eta {duration(left)}"]))

    def validated(self, step: int, validation: Validation) -> None:
        self.say(f"step {step}  {validation.summary() or 'validated without distances'}")

    def say(self, text: str) -> None:
        print(text, flush=True)


class Json(Screen):
    """One JSON object per line on stdout. Each has `event` and, where it applies, `step`."""

    def __init__(self, unit: str) -> None:
        self._unit = unit

    def start(self, rows: Sequence[tuple[str, str]]) -> None:
        self._write("start", **dict(rows))

    def numbers(self, step: int, values: Mapping[str, float], left: float) -> None:
        self._write(self._unit, step=step, seconds_left=left, **values)

    def validated(self, step: int, validation: Validation) -> None:
        self._write("validation", step=step, **validation.metrics, **validation.intervals)

    def phase(self, name: str) -> None:
        self._write("phase", name=name)

    def say(self, text: str) -> None:
        self._write("message", text=text)

    def _write(self, event: str, **values: float | str) -> None:
        # JSON has no numbers that are not finite.
        known = {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in values.items()}
        print(json.dumps({"event": event, "time": time.time(), **known}), flush=True)


class Bar(Screen):
    """A bar with the present numbers on lines below it, and tables above it."""

    def __init__(self, console: Console, steps: int, done: int) -> None:
        self._console, self._numbers = console, Text(no_wrap=True)
        columns = [
            SpinnerColumn(),
            TextColumn(f"{{task.description:<{PHASE_WIDTH}}}"),
            BarColumn(BAR_WIDTH),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[left]}"),
        ]
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task(TRAINING, total=steps, completed=done, left="")
        # Other output is left alone: it may come from a thread, or from a library that counts columns.
        options = {"redirect_stdout": False, "redirect_stderr": False, "refresh_per_second": 4}
        self._live = Live(Group(self._bar, self._numbers), console=console, **options)
        self._live.start()

    def start(self, rows: Sequence[tuple[str, str]]) -> None:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(style="cyan", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, Text(value))
        self._console.print(table)

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def numbers(self, step: int, values: Mapping[str, float], left: float) -> None:
        self._bar.update(self._task, left=f"{duration(left)} left")
        self._numbers.plain = "\n".join(filled(numbers(values), self._console.width))

    def validated(self, step: int, validation: Validation) -> None:
        self._console.print(validation_table(step, validation))

    def phase(self, name: str) -> None:
        self._bar.update(self._task, description=name)

    def say(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def close(self) -> None:
        self._live.stop()


def validation_table(step: int, validation: Validation) -> Table:
    """Make a table with one row per number of calls, and one column per metric with its 95 % interval."""
    names = list(dict.fromkeys(name.rpartition("_")[0] for name in validation.metrics))
    calls = list(dict.fromkeys(name.rpartition("_")[2] for name in validation.metrics))
    table = Table(title=f"validation at step {step}", title_justify="left", title_style="bold")
    for heading in ("calls", *(name.replace("_", " ") for name in names)):
        table.add_column(heading, justify="right")
    for count in calls:
        table.add_row(count, *(validation.text(f"{name}_{count}") for name in names))
    return table


def numbers(values: Mapping[str, float]) -> list[str]:
    """Format the numbers of a step with short names: `loss 0.25`."""
    shown = {name: value for name, value in values.items() if HIDDEN not in name}
    return [f"{SHORT.get(name, name)} {_number(value)}" for name, value in shown.items()]


def filled(parts: Sequence[str], width: int) -> list[str]:
    """Distribute parts over lines of at most `width` columns; no part is divided."""
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}  {part}" if lines[-1] else part
        lines = [*lines[:-1], joined] if len(joined) <= width else [*lines, part]
    return lines


@contextmanager
def surviving() -> Iterator[None]:
    """Print inside the block. If that fails, drop further output: a reader that ended must not end the run."""
    try:
        yield
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(nowhere, stream.fileno())


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e-2 else f"{value:.4g}"
