"""The verdict and the actions of one process if another one is silent. `test_faults` has real processes."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from anyflow_train.training.processes import heartbeat
from anyflow_train.training.processes.activity import Activity
from anyflow_train.training.processes.hang_detector import ProcessReport, Verdict
from anyflow_train.training.processes.heartbeat import HUNG, LEAVING_SECONDS, Heartbeat
from anyflow_train.training.processes.world import World

SECONDS = 100.0
NOW = 1000.0


class Ended(Exception):
    """Raised instead of ending the process."""


def report(rank: int, doing: str = "training", changes: int = 30, exempt: bool = False, **others: Any) -> ProcessReport:
    activity = Activity(step=4, doing=doing, changes=changes, exempt_from_timeout=exempt)
    usual = ProcessReport(rank, "here", 100 + rank, 50, beats=1, activity=activity)
    return replace(usual, **others)


def beating(rank: int, *reports: ProcessReport, logs: Path = Path()) -> Heartbeat:
    """A process that has just received all reports."""
    world = World(torch.device("cpu"), rank, len(reports))
    world.activity.begin("training", step=6)
    found = Heartbeat(world, SECONDS, logs)
    found._own = replace(reports[rank], pid=os.getpid())
    found._reports, found._heard = list(reports), NOW
    return found


def test_a_hang_is_reported_within_the_timeout() -> None:
    """The limit is two intervals shorter, because sending and reading a report takes up to one interval each."""
    beat = beating(0, report(0), report(1))
    assert beat._hang_detector.seconds + 2 * beat._interval == SECONDS
    assert beat._interval == heartbeat.LONGEST_INTERVAL
    assert Heartbeat(World(torch.device("cpu")), 8.0, Path())._interval == pytest.approx(0.8)


def test_all_is_well() -> None:
    assert beating(0, report(0), report(1))._verdict(NOW) is None


def test_silence_of_the_store_is_process_0_s() -> None:
    beat = beating(1, report(0), report(1))
    limit = beat._hang_detector.seconds
    assert beat._verdict(NOW + limit - 0.1) is None
    verdict = beat._verdict(NOW + limit)
    assert verdict is not None
    assert verdict.text.startswith("no report for 90 s from process 0")
    assert [silent.rank for silent in verdict.silent] == [0]


def test_a_store_that_is_gone_took_process_0_with_it_unless_the_run_ends() -> None:
    beat = beating(1, report(0), report(1))
    beat._lost_since = NOW
    assert beat._verdict(NOW + LEAVING_SECONDS) is None  # time for this process's own end
    verdict = beat._verdict(NOW + LEAVING_SECONDS + 0.1)
    assert verdict is not None
    assert verdict.text.startswith("lost contact with process 0")
    assert verdict.silent == ()


def test_one_that_left_is_waited_for_by_nobody() -> None:
    beat = beating(0, report(0), report(1, exited=True), report(2))
    for now in (NOW, NOW + LEAVING_SECONDS):
        beat._heard = now
        assert beat._verdict(now) is None
    verdict = beat._verdict(NOW + LEAVING_SECONDS + 0.1)
    assert verdict is not None
    assert "process 1" in verdict.text
    assert "has ended" in verdict.text
    assert "process 2" not in verdict.text


def test_others_are_judged_by_the_watch() -> None:
    beat = beating(0, report(0), report(1))
    beat._verdict(NOW)
    beat._reports = [report(0, beats=2), report(1)]
    beat._heard = NOW + SECONDS
    verdict = beat._verdict(NOW + SECONDS)
    assert verdict is not None
    assert [silent.rank for silent in verdict.silent] == [1]


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """A process that ends itself, with the recorded output and signals."""
    acts: list[tuple[object, ...]] = []

    def leave(code: int) -> NoReturn:
        acts.append(("exit", code))
        raise Ended

    monkeypatch.setattr(heartbeat, "tell_terminal", lambda text: acts.append(("tell", text.strip())))
    monkeypatch.setattr(heartbeat.os, "kill", lambda pid, number: acts.append(("kill", pid, number)))
    monkeypatch.setattr(heartbeat.os, "_exit", leave)
    monkeypatch.setattr(heartbeat.time, "sleep", lambda seconds: acts.append(("sleep", seconds)))
    return acts


def end(beat: Heartbeat, *silent: ProcessReport) -> None:
    with pytest.raises(Ended):
        beat._end(Verdict("no report from process 0", silent))


def test_the_first_that_can_speak_does_and_kills_what_is_stopped(
    done: list[tuple[object, ...]], tmp_path: Path
) -> None:
    stopped = report(0)
    end(beating(1, stopped, report(1), report(2), logs=tmp_path), stopped)
    (_, text), *others = done
    assert str(text).startswith("error: no report from process 0; process 1 is at step 7, training; the run ends")
    assert others == [("kill", 100, signal.SIGKILL), ("exit", HUNG)]


def test_the_others_only_leave_a_log_of_where_they_stand(done: list[tuple[object, ...]], tmp_path: Path) -> None:
    end(beating(2, report(0), report(1), report(2), logs=tmp_path))
    assert done == [("exit", HUNG)]
    text = (tmp_path / "process_00002.txt").read_text()
    assert text.startswith("error: no report from process 0")
    assert "Stack traces of process 2" in text
    assert "test_heartbeat.py" in text  # the stacks


def test_process_0_keeps_its_store_until_the_others_have_found_the_reason(
    done: list[tuple[object, ...]], tmp_path: Path
) -> None:
    beat = beating(0, report(0), report(1), logs=tmp_path)
    end(beat)
    # A process finds a reason one interval after process 0 at the latest, if it runs at all.
    assert done[1:] == [("sleep", 3 * beat._interval), ("exit", HUNG)]


def test_one_that_left_does_not_speak(done: list[tuple[object, ...]], tmp_path: Path) -> None:
    end(beating(1, report(0, exited=True), report(1), logs=tmp_path))
    assert done[0][0] == "tell"


@pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"launcher": 51}])
def test_a_stranger_with_the_same_number_is_not_killed(
    done: list[tuple[object, ...]], tmp_path: Path, changes: dict[str, Any]
) -> None:
    stopped = report(1, **changes)
    end(beating(0, report(0), stopped, logs=tmp_path), stopped)
    assert "kill" not in [act[0] for act in done]


def test_no_log_is_no_reason_to_stay(done: list[tuple[object, ...]], tmp_path: Path) -> None:
    end(beating(0, report(0), report(1), logs=tmp_path / "missing"))
    assert done[-1] == ("exit", HUNG)
