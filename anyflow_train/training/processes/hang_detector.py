"""Which process keeps the others waiting: a rule over what each process last said of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessReport:
    """What a process says of itself, again and again.

    Attributes:
        rank, host, pid, launcher: who it is; `launcher` is its parent's process id.
        beats: how often its heartbeat thread has spoken.
        step, doing, moves, exempt_from_timeout: of its main thread, see `Activity`.
        exited: whether it has taken leave.
    """

    rank: int
    host: str
    pid: int
    launcher: int
    beats: int = 0
    step: int = 0
    doing: str = "starting"
    changes: int = 0
    exempt_from_timeout: bool = True
    exited: bool = False

    def __str__(self) -> str:
        return f"process {self.rank} ({self.host}, pid {self.pid}), last heard of at step {self.step + 1}, {self.doing}"


@dataclass(frozen=True)
class Verdict:
    """Why a run cannot go on.

    Attributes:
        text: for people.
        silent: processes that do not even speak any more; they cannot end themselves.
    """

    text: str
    silent: tuple[ProcessReport, ...] = ()


class HangDetector:
    """Judges the reports of all processes.

    A process that no longer speaks was stopped or is lost. One that speaks while its main thread does not move hangs,
    or waits for another that does: the fewest moves tell which. What may take any time is left in peace.

    Args:
        seconds: how long a process may be silent, or its main thread at one thing.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._spoke: dict[int, tuple[int, float]] = {}
        self._moved: dict[int, tuple[int, float]] = {}

    def judge(self, reports: Sequence[ProcessReport], now: float) -> Verdict | None:
        """Take in the newest reports of all processes, at a time in seconds."""
        present = [report for report in reports if not report.exited]
        silent = [r for r in present if _unchanged(self._spoke, r.rank, r.beats, now) >= self.seconds]
        waits = {r.rank: _unchanged(self._moved, r.rank, r.changes, now) for r in present}
        if silent:
            names = "; ".join(map(str, silent))
            return Verdict(f"no sign of life for {self.seconds:.0f} s from {names}", tuple(silent))
        last = min((report.changes for report in present), default=0)
        behind = [report for report in present if report.changes == last]
        if any(report.exempt_from_timeout or waits[report.rank] < self.seconds for report in behind):
            return None
        names = "; ".join(map(str, behind))
        return Verdict(f"nothing has moved for {self.seconds:.0f} s in {names}") if behind else None

    def forget(self) -> None:
        """Start all clocks anew: the time that has passed was no process's fault."""
        self._spoke.clear()
        self._moved.clear()


def _unchanged(seen: dict[int, tuple[int, float]], rank: int, count: int, now: float) -> float:
    """For how long a process's count has been the same."""
    before = seen.get(rank)
    if before is None or before[0] != count:
        seen[rank] = (count, now)
        return 0.0
    return now - before[1]
