"""launch/train.sh: GPUs that it finds, arguments that it refuses, and signals and exit codes that it passes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from anyflow_train.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
# Stand-in for `python`: records the call of the launcher, and behaves like the processes of a run.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
echo "world ${WORLD_SIZE:-} threads $OMP_NUM_THREADS" >>"$CALLS"
[ "$1" = -c ] && { [ "$MODE" != absent ] || exit 1; exit 0; }
if [ "$3" = check ]; then
  [ "$MODE" != mistake ] || { echo "error: steps: is wrong" >&2; exit 2; }
  exit 0
fi
worker() {
  trap 'echo "got USR1" >>"$CALLS"; echo 75 >>"$ANYFLOW_LAUNCH/codes"; exit 0' USR1
  trap 'echo "got TERM" >>"$CALLS"; exit 0' TERM
  echo "$BASHPID" >>"$ANYFLOW_LAUNCH/processes"
  touch "$CALLS.ready"
  while true; do sleep 0.05; done
}
case $MODE in
  wait) worker & wait $! ;;
  user) echo 2 >>"$ANYFLOW_LAUNCH/codes"; exit 0 ;;
  crash) exit 1 ;;
esac
"""


def start(folder: Path, *words: str, mode: str = "", **variables: str) -> subprocess.Popen[str]:
    """Start train.sh with stand-ins for python and for nvidia-smi, which shows three GPUs."""
    (folder / "python").write_text(PYTHON)
    (folder / "nvidia-smi").write_text('#!/bin/sh\nfor i in 0 1 2; do echo "GPU $i: a card"; done\n')
    for name in ("python", "nvidia-smi"):
        (folder / name).chmod(0o755)
    names = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WORLD_SIZE", "NPROC", "NNODES", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), "MODE": mode, **variables}
    command = [str(ROOT / "launch" / "train.sh"), *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def calls(folder: Path) -> str:
    return (folder / "calls").read_text()


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({}, 3),
        ({"CUDA_VISIBLE_DEVICES": "4,7"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f,"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 1),
        ({"NPROC": "5"}, 5),
    ],
)
def test_one_process_a_gpu(tmp_path: Path, variables: dict[str, str], count: int) -> None:
    assert start(tmp_path, "zero2", "steps=1", **variables).wait(120) == 0
    assert f"--num_processes {count} --num_machines 1 --main_process_port 0 -m anyflow_train train steps=1" in calls(
        tmp_path
    )
    assert f"-m anyflow_train check steps=1\nworld {count} " in calls(tmp_path)
    assert "launch/zero2.yaml" in calls(tmp_path)


def test_several_nodes(tmp_path: Path) -> None:
    place = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node7", "MASTER_PORT": "29500", "NPROC": "4"}
    assert start(tmp_path, "ddp", **place).wait(120) == 0
    expected = "--num_processes 8 --num_machines 2 --machine_rank 1 --main_process_ip node7 --main_process_port 29500"
    assert expected in calls(tmp_path)


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ((), {}, "which strategy"),
        (("zero9",), {}, "'zero9' is not one of: ddp single zero1 zero2 zero3 zero3_offload"),
        (("single",), {"NPROC": "2"}, "'single' is one process, not 2"),
        (("ddp",), {"NPROC": "two"}, "NPROC is 'two'"),
        (("ddp",), {"NNODES": "2"}, "needs MASTER_ADDR and MASTER_PORT"),
        (("ddp",), {"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "0"}, "MASTER_PORT is 0"),
        (("ddp",), {"NNODES": "2", "NODE_RANK": "2"}, "nodes count from 0"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, words: tuple[str, ...], variables: dict[str, str], message: str) -> None:
    process = start(tmp_path, *words, **variables)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "calls").exists()


def test_a_wrong_config_starts_nothing(tmp_path: Path) -> None:
    process = start(tmp_path, "ddp", mode="mistake")
    assert process.communicate(timeout=120)[1] == "error: steps: is wrong\n"
    assert process.returncode == 2
    assert "accelerate" not in calls(tmp_path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 0)])
def test_signals_go_to_the_processes_and_their_code_comes_back(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = start(tmp_path, "ddp", mode="wait")
    while not (tmp_path / "calls.ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(120) == code
    assert f"got {number.name.removeprefix('SIG')}" in calls(tmp_path)


@pytest.mark.parametrize(("mode", "code"), [("user", 2), ("crash", 1)])
def test_exit_codes(tmp_path: Path, mode: str, code: int) -> None:
    assert start(tmp_path, "ddp", mode=mode).wait(120) == code


@pytest.mark.parametrize("script", ["train.sh", "slurm.sbatch", "environment.sh"])
def test_scripts_are_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "launch" / script)], check=True)


def test_the_installed_package_has_the_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """`anyflow launch` becomes the script, with this Python first on PATH, whatever the environment is."""
    seen: list = []
    monkeypatch.setattr(os, "execve", lambda *call: seen.append(call))
    main(["launch", "zero2", "experiment=tiny", "--config-dir", "mine"])
    (_, words, environment) = seen[0]
    assert words[1:] == [str(ROOT / "launch" / "train.sh"), "zero2", "experiment=tiny", "--config-dir", "mine"]
    assert environment["PATH"].split(":")[0] == str(Path(sys.executable).parent)
    assert main(["launch", "slurm"]) == 0
    assert "#SBATCH --mem=0" in capsys.readouterr().out


def test_nothing_is_installed_on_a_node(tmp_path: Path) -> None:
    process = start(tmp_path, "ddp", mode="absent", SLURM_JOB_ID="7")
    assert "nothing is installed on nodes" in process.communicate(timeout=120)[1]
    assert process.returncode == 2


def test_a_strategy_alone_shows_how_to_train(tmp_path: Path) -> None:
    process = start(tmp_path, "ddp", mode="mistake")
    process.communicate(timeout=120)
    assert process.returncode == 2
    assert calls(tmp_path).splitlines()[-2] == "-m anyflow_train train"  # which prints examples
    assert "accelerate" not in calls(tmp_path)
