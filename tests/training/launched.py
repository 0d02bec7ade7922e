"""Launches of two processes on one machine that do the tiny run of `helpers`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.training.helpers import in_process, settings
from tests.training.words import ROOT

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 240.0  # seconds; a start takes 12 s on a quiet machine, and ten times that on a busy one
GRACE = 30.0  # seconds that a process has to end after the other one has failed, as with torch's launcher
Start = Callable[[str, list[str], Path, dict[str, str]], None]
"""Becomes the launcher: engine, arguments of `worker.work`, the terminal's file, additional variables."""


class Launch:
    """A launch in progress.

    Args:
        start: `accelerate` or `fork`.
        engine: name of a file of `launch/`.
        cases: what each process does, see `worker`.
        folder: where the terminal's text and the results are kept.
        environment: additional variables.
    """

    def __init__(
        self,
        start: Start,
        engine: str,
        cases: list[dict[str, Any]],
        folder: Path,
        **environment: str,
    ) -> None:
        self.folder = folder
        self.log = folder / "terminal.txt"
        self._results, self._pids = folder / "results.jsonl", folder / "pids.txt"
        for path in (self._results, self._pids, self.log):
            path.write_text("")
        words = [json.dumps(cases), str(self._results), str(self._pids)]
        variables = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        self.process = in_process(start, engine, words, self.log, variables)

    def workers(self) -> dict[int, int]:
        """Return the process ids by rank, of those that have begun."""
        return {int(rank): int(pid) for rank, pid in map(str.split, self._pids.read_text().splitlines())}

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.text()
            assert self.process.is_alive(), self.text()
            time.sleep(0.02)

    def text(self) -> str:
        """Return what the terminal shows."""
        return self.log.read_text(errors="replace")

    def results(self, case: str) -> list[dict[str, Any]]:
        """Return what each process ended the starts of a case with, by rank: see `worker`."""
        rows = [row for row in map(json.loads, self._results.open()) if row["case"] == case]
        return sorted(rows, key=lambda row: row["rank"])

    def codes(self, case: str) -> list[int]:
        """Return the exit codes of a case."""
        return [row["code"] for row in self.results(case)]

    def ended(self, seconds: float = PATIENCE) -> int:
        """Wait for the launcher's end. Returns its exit code."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s\n{self.text()}")
        assert self.process.exitcode is not None
        return self.process.exitcode


def accelerate(engine: str, words: list[str], log: Path, variables: dict[str, str], processes: int = 2) -> None:
    """Become `accelerate launch`, which is what users start. Its three processes import for 10 s of a core's time."""
    begin(log, variables)
    options = ["--config_file", str(ROOT / "launch" / f"{engine}.yaml"), "--num_processes", str(processes)]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    os.execv(sys.executable, [*command, str(WORKER), *words])


def fork(engine: str, words: list[str], log: Path, variables: dict[str, str]) -> None:
    """Be the launcher of two processes in which the imports are already done.

    For tests of what the processes do. Of `accelerate launch` it keeps the variables, the store that the processes meet
    at, and that the failure of one ends the other.
    """
    begin(log, variables)
    inbox, outbox = os.pipe()
    ranks = {_fork_worker(rank, engine, words, inbox): rank for rank in range(2)}
    # After the forks: the store has threads, which a fork would lose.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(outbox, 2 * f"{store.port:05d}".encode())
    code = 0
    while ranks:
        pid, status = os.wait()
        del ranks[pid]
        if status and ranks:
            _end(list(ranks))
        code = code or int(status != 0)
    os._exit(code)


def begin(log: Path, variables: dict[str, str]) -> None:
    os.setsid()
    os.environ.update(variables)
    sys.path += variables["PYTHONPATH"].split(os.pathsep)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def _fork_worker(rank: int, engine: str, words: list[str], inbox: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": os.read(inbox, 5).decode()}
        elastic = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        os.environ.update({**{name: str(value) for name, value in places.items()}, **meeting, **elastic})
        from tests.training import worker  # it reads its rank

        worker.choose_engine(engine)
        worker.work(*words)
    except BaseException:
        traceback.print_exc()
    os._exit(1)  # never back into the code of the process that was forked


def _end(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while any(not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in pids):
        if time.monotonic() > deadline:
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def train_case(folder: Path, *faults: list[Any], **changes: Any) -> dict[str, Any]:
    """Return a case of `worker` that trains the tiny run."""
    return {"config": settings(folder, **{"engine__micro_batch": 2, **changes}), "faults": faults}
