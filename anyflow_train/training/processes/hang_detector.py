"""Find the process that makes a run hang, from the last report of every process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from anyflow_train.training.processes.activity import Activity


@dataclass(frozen=True)
class ProcessReport:
    """A process's regular report about itself.

    Attributes:
        rank: number of the process.
        host: name of its machine.
        pid: process id.
        launcher: process id of its parent.
        beats: number of reports that its heartbeat thread has sent.
        activity: activity of its main thread.
        exited: whether the process has ended.
    """

    rank: int
    host: str
    pid: int
    launcher: int
    beats: int = 0
    activity: Activity = field(default_factory=Activity)
    exited: bool = False

    def __str__(self) -> str:
        return f"process {self.rank} ({self.host}, pid {self.pid}), last report: {self.activity}"


@dataclass(frozen=True)
class Verdict:
    """The reason why a run cannot continue.

    Attributes:
        text: message for the user.
        silent: processes that no longer report; they cannot end themselves.
    """

    text: str
    silent: tuple[ProcessReport, ...] = ()


class HangDetector:
    """Finds silent and hanging processes in the reports of all processes.

    A process that no longer reports was stopped or is lost. If a process reports but its main thread makes no progress,
    it hangs or waits for another process. The process with the fewest changes is the one that hangs. Activities that
    may take any time are exempt.

    Args:
        seconds: longest time without a report, or with one activity of the main thread.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._seen: dict[tuple[str, int], tuple[int, float]] = {}

    def judge(self, reports: Sequence[ProcessReport], now: float) -> Verdict | None:
        """Judge the newest reports of all processes at the time `now`, in seconds. Returns None if nothing is wrong."""
        present = [report for report in reports if not report.exited]
        silent = [r for r in present if self._unchanged("beats", r.rank, r.beats, now) >= self.seconds]
        waits = {r.rank: self._unchanged("changes", r.rank, r.activity.changes, now) for r in present}
        if silent:
            names = "; ".join(map(str, silent))
            return Verdict(f"no report for {self.seconds:.0f} s from {names}", tuple(silent))
        last = min((report.activity.changes for report in present), default=0)
        behind = [report for report in present if report.activity.changes == last]
        if any(report.activity.exempt_from_timeout or waits[report.rank] < self.seconds for report in behind):
            return None
        names = "; ".join(map(str, behind))
        return Verdict(f"no progress for {self.seconds:.0f} s in {names}") if behind else None

    def forget(self) -> None:
        """Restart all clocks, after this process itself was stopped for a while."""
        self._seen.clear()

    def _unchanged(self, name: str, rank: int, count: int, now: float) -> float:
        """Seconds since a count of a process last changed."""
        before, since = self._seen.get((name, rank), (None, now))
        self._seen[name, rank] = (count, since if before == count else now)
        return now - self._seen[name, rank][1]
