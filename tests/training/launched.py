"""Real launches of two processes on one machine, through `accelerate launch`, of the tiny run of `helpers`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.training.helpers import settings
from tests.training.words import ROOT

WORKER = Path(__file__).with_name("worker.py")
PATIENCE = 240.0  # a start takes 12 s on a quiet machine, and ten times that on a busy one


class Launch:
    """A launch in progress.

    Args:
        cases: what each process does, see `worker`.
        folder: for what the terminal shows and what the processes end with.
    """

    def __init__(self, engine: str, cases: list[dict[str, Any]], folder: Path, **environment: str) -> None:
        self.folder = folder
        self.log = folder / "terminal.txt"
        self._results = folder / "results.jsonl"
        self._results.unlink(missing_ok=True)
        options = ["--config_file", str(ROOT / "launch" / f"{engine}.yaml"), "--num_processes", "2"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
        quiet = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, str(WORKER), json.dumps(cases), str(self._results)],
                stdout=file,
                stderr=file,
                env={**os.environ, **quiet},
                start_new_session=True,
            )

    def workers(self) -> dict[int, int]:
        """Process ids by rank."""
        found = {}
        with suppress(OSError):  # one that is ending
            for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                ranks = [int(text[5:]) for text in variables if text.startswith(b"RANK=")]
                found |= dict.fromkeys(ranks, int(pid))
        return found

    def wait_for(self, condition: Callable[[], Any]) -> None:
        """Until something is so."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.text()
            assert self.process.poll() is None, self.text()
            time.sleep(0.02)

    def text(self) -> str:
        """What the terminal shows."""
        return self.log.read_text(errors="replace")

    def results(self, case: str) -> list[dict[str, Any]]:
        """What each process ended the starts of a case with, by rank: see `worker`."""
        rows = [row for row in map(json.loads, self._results.open()) if row["case"] == case]
        return sorted(rows, key=lambda row: row["rank"])

    def codes(self, case: str) -> list[int]:
        """The exit codes of a case."""
        return [row["code"] for row in self.results(case)]

    def ended(self, seconds: float = PATIENCE) -> int:
        """Wait for the launcher's end. Returns its exit code."""
        try:
            return self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.kill()


def train_case(folder: Path, *faults: list[Any], **changes: Any) -> dict[str, Any]:
    """A case of `worker` that trains the tiny run."""
    return {"config": settings(folder, **{"engine__micro_batch": 2, **changes}), "faults": faults}
