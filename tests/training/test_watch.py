"""Who is to blame for a wait: judged from what the processes say of themselves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from anyflow_train.training.pulse import Pulse
from anyflow_train.training.watch import Report, Verdict, Watch

SECONDS = 10.0


def report(rank: int, **changes: object) -> Report:
    usual = Report(rank, f"host{rank}", 100 + rank, 50, beats=1, step=4, doing="training", moves=30, long=False)
    return replace(usual, **changes)  # pyright: ignore[reportArgumentType]


def after(seconds: float, first: list[Report], then: list[Report]) -> Verdict | None:
    """What a watch says that saw the one, and so much later the other."""
    watch = Watch(SECONDS)
    assert watch.judge(first, 100.0) is None
    return watch.judge(then, 100.0 + seconds)


def test_processes_that_move_are_left_in_peace() -> None:
    first = [report(0), report(1)]
    assert after(1000.0, first, [replace(r, beats=2, moves=31) for r in first]) is None


def test_a_process_that_is_silent_is_named_with_its_host() -> None:
    first = [report(0), report(1)]
    then = [report(0, beats=2), report(1)]
    assert after(SECONDS - 0.1, first, then) is None
    verdict = after(SECONDS, first, then)
    assert verdict is not None
    assert [silent.rank for silent in verdict.silent] == [1]
    assert "process 1 (host1, pid 101), last heard of at step 5, training" in verdict.text
    assert "process 0" not in verdict.text


def test_of_those_that_do_not_move_the_one_behind_is_named() -> None:
    first = [report(0, moves=33), report(1, moves=33), report(2, doing="loading data", moves=32)]
    verdict = after(SECONDS, first, [replace(r, beats=9) for r in first])
    assert verdict is not None
    assert verdict.silent == ()
    assert "process 2 (host2, pid 102), last heard of at step 5, loading data" in verdict.text
    assert "process 0" not in verdict.text
    assert "process 1" not in verdict.text


def test_all_are_named_where_none_is_behind() -> None:
    first = [report(0), report(1)]
    verdict = after(SECONDS, first, [replace(r, beats=9) for r in first])
    assert verdict is not None
    assert "process 0" in verdict.text
    assert "process 1" in verdict.text


def test_what_may_take_long_does_and_who_waits_for_it_may_wait() -> None:
    first = [report(0, doing="saving", long=True, moves=29), report(1)]
    assert after(1000.0, first, [replace(r, beats=9) for r in first]) is None


def test_one_that_has_left_is_not_missed() -> None:
    first = [report(0), report(1, left=True, moves=3)]
    assert after(1000.0, first, [report(0, beats=2, moves=31), first[1]]) is None


def test_nobody_is_to_blame_where_all_have_left() -> None:
    first = [report(0, left=True), report(1, left=True)]
    assert after(1000.0, first, first) is None


def test_a_watch_that_slept_itself_starts_anew() -> None:
    watch = Watch(SECONDS)
    reports = [report(0), report(1)]
    watch.judge(reports, 0.0)
    watch.forget()
    assert watch.judge(reports, 1000.0) is None
    assert watch.judge(reports, 1000.0 + SECONDS) is not None


def test_a_pulse_counts_every_move_and_goes_back_to_what_it_was_at() -> None:
    pulse = Pulse()
    assert pulse.long
    pulse.at("training", step=3)
    assert (pulse.step, pulse.doing, pulse.long, pulse.moves) == (3, "training", False, 1)
    with pulse.at_length("saving"):
        assert (pulse.doing, pulse.long) == ("saving", True)
        assert list(pulse.along("ab")) == ["a", "b"]
    assert (pulse.doing, pulse.long, pulse.moves) == ("training", False, 5)
    pulse.move()
    assert pulse.moves == 6


def test_a_pulse_goes_back_after_an_error_too() -> None:
    pulse = Pulse()
    pulse.at("training", step=0)
    with pytest.raises(KeyError), pulse.at_length("saving"):
        raise KeyError
    assert not pulse.long
