"""The SLURM script, with stand-ins for `srun` and `scontrol` that record their arguments."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SRUN = """#!/usr/bin/env bash
echo "srun $*" >>"$CALLS"
echo "place $MASTER_ADDR $MASTER_PORT $NNODES" >>"$CALLS"
trap 'echo "srun got USR1" >>"$CALLS"; exit 75' USR1
trap 'echo "srun got TERM" >>"$CALLS"; exit 0' TERM
[ -z "$CODE" ] || exit "$CODE"
touch "$CALLS.ready"
while true; do sleep 0.05; done
"""
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$CALLS"
[ "$1" != show ] || printf 'node7\\nnode8\\n'
"""


class Job:
    """A job of two nodes, as SLURM would start it."""

    def __init__(self, folder: Path, code: str = "", root: Path = ROOT) -> None:
        for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(content)
            (folder / name).chmod(0o755)
        self._calls = folder / "calls"
        variables = {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "CALLS": str(self._calls),
            "CODE": code,
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[7-8]",
            "SLURM_JOB_ID": "41",
            "SLURM_SUBMIT_DIR": str(root),
        }
        self.process = subprocess.Popen(
            ["bash", str(ROOT / "launch" / "slurm.sbatch"), "zero2", "experiment=tiny"],
            env={**os.environ, **variables},
            stderr=subprocess.PIPE,
            text=True,
        )

    def calls(self) -> list[str]:
        return self._calls.read_text().splitlines() if self._calls.exists() else []

    def ready(self) -> None:
        while not Path(f"{self._calls}.ready").exists():
            assert self.process.poll() is None
            time.sleep(0.02)


def test_one_task_a_node_and_the_first_node_is_the_meeting_place(tmp_path: Path) -> None:
    job = Job(tmp_path, code="0")
    assert job.process.wait(120) == 0
    assert job.calls()[0] == "scontrol show hostnames node[7-8]"
    assert "--ntasks=2 --ntasks-per-node=1" in job.calls()[1]
    assert job.calls()[1].endswith("launch/train.sh zero2 experiment=tiny")
    assert job.calls()[2] == "place node7 20041 2"
    assert not any("requeue" in call for call in job.calls())


def test_time_that_is_up_requeues(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.ready()
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(120) == 75
    assert job.calls()[-2:] == ["srun got USR1", "scontrol requeue 41"]


def test_a_cancelled_job_stays_cancelled(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.ready()
    job.process.send_signal(signal.SIGTERM)
    assert job.process.wait(120) == 0
    assert job.calls()[-1] == "srun got TERM"


@pytest.mark.parametrize("code", ["1", "2"])
def test_a_failure_is_not_repeated(tmp_path: Path, code: str) -> None:
    job = Job(tmp_path, code=code)
    assert job.process.wait(120) == int(code)
    assert not any("requeue" in call for call in job.calls())


def test_a_job_submitted_from_elsewhere_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    job = Job(tmp_path, root=tmp_path)
    assert job.process.wait(120) == 2
    assert "ANYFLOW_ROOT" in (job.process.stderr.read() if job.process.stderr else "")


def test_a_job_submitted_from_elsewhere_uses_the_installed_package(tmp_path: Path) -> None:
    (tmp_path / "anyflow").write_text("#!/bin/sh\n")
    (tmp_path / "anyflow").chmod(0o755)
    job = Job(tmp_path, code="0", root=tmp_path)
    assert job.process.wait(120) == 0
    assert job.calls()[1].endswith("anyflow launch zero2 experiment=tiny")
