"""What a run shows: at 80 columns on a terminal, as plain lines, and as JSON lines."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from anyflow_train.config.base import Log
from anyflow_train.text import duration
from anyflow_train.training.reporting import progress as screens
from anyflow_train.training.reporting import tasks
from anyflow_train.training.reporting.progress import StepProgress
from anyflow_train.training.reporting.tasks import TaskProgress
from anyflow_train.training.validation import Validation

MORE = {f"loss_branch_{number}": 0.5 for number in range(6)}
VALUES = {"learning_rate": 1e-3, "loss": 0.25, "seconds_per_step": 2.0, "samples_per_second": 16.0, "a/rollout_1": 3.0}
METRICS = {"energy_distance_1": 0.51, "energy_distance_4": 0.25, "class_error_1": 0.1}
VALIDATION = Validation(METRICS, {}, {"energy_distance_1_low": 0.43, "energy_distance_1_high": 0.6})
LONG = "warning: " + "a very long sentence that must stay on one line " * 4


@contextmanager
def terminal(width: int) -> Iterator[io.StringIO]:
    """In place of stderr: a terminal, whose output is yielded."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, height=30, color_system=None, legacy_windows=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screens, "Console", lambda stderr: console)
        yield out


def on_a_terminal(width: int) -> str:
    with terminal(width) as out:
        progress = StepProgress(400, 0)
    progress.start([("run", "runs/tiny"), ("tokens", "1,280 per sample")])
    for _ in range(100):
        progress.advance()
    progress.show(100, VALUES | MORE)
    with progress.phase("validating") as show:
        show(2, 4)
        progress._screen._screen._live.refresh()
    progress.validated(100, VALIDATION)
    progress.say(LONG)
    progress.close()
    return out.getvalue()


@pytest.fixture(autouse=True)
def kind_of_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def test_a_terminal_that_moves_no_cursor_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with terminal(80):
        progress = StepProgress(400, 0)
    progress.start([])
    progress.advance()
    progress.show(100, VALUES)
    progress.close()
    assert "step 100/400" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_a_bar_that_fits(width: int) -> None:
    text = on_a_terminal(width)
    lines = [line.rstrip() for line in text.replace("\x1b[2K", "").splitlines()]
    bars = [line for line in lines if "100/400" in line and "━" in line]
    assert bars
    assert "10:00 left" in bars[-1]  # 300 steps of 2 s; the time of a validation is not part of it
    assert any("validating 2/4" in line for line in lines)
    assert any(line.startswith("lr 0.001  loss 0.25  s/step 2") for line in lines)
    assert max(len(line) for line in lines if "warning" not in line) <= width
    assert any("loss_branch_5 0.5" in line for line in lines)  # numbers that do not fit go to another line
    assert sum(LONG.strip() in line for line in lines) == 1  # not wrapped
    assert any("0.51 [0.43, 0.6]" in line and "0.1" in line for line in lines)


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StepProgress(400, 0)
    progress.start([("run", "runs/tiny")])
    progress.advance()
    progress.show(100, VALUES)
    with progress.phase("saving"):
        progress.validated(100, VALIDATION)
    progress.validated(200, replace(VALIDATION, metrics={}))
    progress.say(LONG)
    progress.close()
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "run            runs/tiny",
        "step 100/400  lr 0.001  loss 0.25  s/step 2  samples/s 16  eta 10:00",
        "step 100  energy_distance_1 0.51 [0.43, 0.6]  energy_distance_4 0.25  class_error_1 0.1",
        "step 200  validated without distances",
        LONG,
    ]
    assert not err


def test_json_lines_are_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    progress = StepProgress(400, 0, "json")
    progress.start([("run", "runs/tiny")])
    progress.show(100, {**VALUES, "gradient_norm": float("nan")})
    with progress.phase("saving"):
        pass
    progress.validated(100, VALIDATION)
    progress.say("done")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["event"] for row in rows] == ["start", "step", "phase", "phase", "validation", "message"]
    assert rows[1]["loss"] == 0.25
    assert rows[1]["gradient_norm"] is None
    assert rows[1]["seconds_left"] == 600
    assert rows[4]["energy_distance_1_low"] == 0.43


def timed(monkeypatch: pytest.MonkeyPatch, log: Log = "auto") -> None:
    """Show a task of 512 clips, of which 2 take a second."""
    now = [0.0]
    monkeypatch.setattr(tasks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with TaskProgress("clips", 512, log) as progress:
        for second in range(1, 41):
            now[0] = float(second)
            progress.advance(2)
        progress.phase("checking")
        progress.say_timed("wrote 80 clips")


def test_a_task_without_a_terminal_prints_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed(monkeypatch)
    lines = [f"clips {2 * second}/512  eta {duration((512 - 2 * second) / 2)}" for second in (10, 20, 30, 40)]
    assert capsys.readouterr().out.splitlines() == [*lines, "[  40.0 s] wrote 80 clips"]


def test_a_task_on_a_terminal_has_a_bar_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(80) as out:
        timed(monkeypatch)
    assert re.search(r"checking +━+.* 80/512 3:36 left", out.getvalue())
    assert "[  40.0 s] wrote 80 clips" in out.getvalue()


def test_a_task_for_programs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    timed(monkeypatch, "json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["event"] for row in rows] == ["phase", *["clips"] * 4, "phase", "message"]
    assert (rows[1]["step"], rows[1]["seconds_left"]) == (20, 246.0)


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (7384, "2:03:04"), (3 * 86400 + 7200, "3d 02:00:00")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
