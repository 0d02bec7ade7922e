"""The hang detector names the process that makes the others wait."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from anyflow_train.training.processes.activity import Activity
from anyflow_train.training.processes.hang_detector import HangDetector, ProcessReport, Verdict

SECONDS = 10.0


def report(rank: int, doing: str = "training", changes: int = 30, exempt: bool = False, **others: Any) -> ProcessReport:
    activity = Activity(step=4, doing=doing, changes=changes, exempt_from_timeout=exempt)
    usual = ProcessReport(rank, f"host{rank}", 100 + rank, 50, beats=1, activity=activity)
    return replace(usual, **others)


def after(seconds: float, first: list[ProcessReport], then: list[ProcessReport]) -> Verdict | None:
    """Verdict of a hang detector that saw the first reports and, some seconds later, the second ones."""
    detector = HangDetector(SECONDS)
    assert detector.judge(first, 100.0) is None
    return detector.judge(then, 100.0 + seconds)


def test_processes_that_move_are_left_in_peace() -> None:
    first = [report(0), report(1)]
    assert after(1000.0, first, [report(rank, beats=2, changes=31) for rank in (0, 1)]) is None


def test_a_process_that_is_silent_is_named_with_its_host() -> None:
    first = [report(0), report(1)]
    then = [report(0, beats=2), report(1)]
    assert after(SECONDS - 0.1, first, then) is None
    verdict = after(SECONDS, first, then)
    assert verdict is not None
    assert [silent.rank for silent in verdict.silent] == [1]
    assert "process 1 (host1, pid 101), last report: step 5, training" in verdict.text
    assert "process 0" not in verdict.text


def test_of_those_that_do_not_move_the_one_behind_is_named() -> None:
    first = [report(0, changes=33), report(1, changes=33), report(2, doing="loading data", changes=32)]
    verdict = after(SECONDS, first, [replace(r, beats=9) for r in first])
    assert verdict is not None
    assert verdict.silent == ()
    assert "process 2 (host2, pid 102), last report: step 5, loading data" in verdict.text
    assert "process 0" not in verdict.text
    assert "process 1" not in verdict.text


def test_all_are_named_where_none_is_behind() -> None:
    first = [report(0), report(1)]
    verdict = after(SECONDS, first, [replace(r, beats=9) for r in first])
    assert verdict is not None
    assert "process 0" in verdict.text
    assert "process 1" in verdict.text


def test_what_may_take_long_does_and_who_waits_for_it_may_wait() -> None:
    first = [report(0, doing="saving", exempt=True, changes=29), report(1)]
    assert after(1000.0, first, [replace(r, beats=9) for r in first]) is None


def test_one_that_has_left_is_not_missed() -> None:
    first = [report(0), report(1, exited=True, changes=3)]
    assert after(1000.0, first, [report(0, beats=2, changes=31), first[1]]) is None


def test_nobody_is_to_blame_where_all_have_left() -> None:
    first = [report(0, exited=True), report(1, exited=True)]
    assert after(1000.0, first, first) is None


def test_a_watch_that_slept_itself_starts_anew() -> None:
    detector = HangDetector(SECONDS)
    reports = [report(0), report(1)]
    detector.judge(reports, 0.0)
    detector.forget()
    assert detector.judge(reports, 1000.0) is None
    assert detector.judge(reports, 1000.0 + SECONDS) is not None


def test_a_pulse_counts_every_move_and_goes_back_to_what_it_was_at() -> None:
    activity = Activity()
    assert activity.exempt_from_timeout
    activity.begin("training", step=3)
    assert (activity.step, activity.doing, activity.exempt_from_timeout, activity.changes) == (3, "training", False, 1)
    with activity.untimed("saving"):
        assert (activity.doing, activity.exempt_from_timeout) == ("saving", True)
    assert (activity.doing, activity.exempt_from_timeout, activity.changes) == ("training", False, 3)
    activity.touch()
    assert activity.changes == 4


def test_a_pulse_goes_back_after_an_error_too() -> None:
    activity = Activity()
    activity.begin("training", step=0)
    with pytest.raises(KeyError), activity.untimed("saving"):
        raise KeyError
    assert not activity.exempt_from_timeout
