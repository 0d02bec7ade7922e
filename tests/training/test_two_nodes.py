"""Two nodes on one machine: two launchers with one process each, which meet on loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.training.helpers import assert_equal_runs, write_latents
from tests.training.launched import WORKER, Launch, begin, fork, train_case
from tests.training.words import ROOT

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.nightly, pytest.mark.timeout(1200)]

STEPS = 8


def two_nodes(engine: str, words: list[str], log: Path, variables: dict[str, str]) -> None:
    """Start `accelerate launch` for each node, as `train.sh` does with NNODES=2, and wait for both."""
    begin(log, variables)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / f"launch/{engine}.yaml")]
    place = ["--num_processes", "2", "--num_machines", "2", "--main_process_ip", "127.0.0.1"]
    place += ["--main_process_port", str(port), "--machine_rank"]
    nodes = [subprocess.Popen([*launch, *place, str(rank), str(WORKER), *words]) for rank in range(2)]
    os._exit(max(node.wait() != 0 for node in nodes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and the run of one process."""
    folder = tmp_path_factory.mktemp("nodes")
    write_latents(folder / "shards")
    return folder


def case(folder: Path, name: str, *faults: list[Any], **changes: Any) -> dict[str, Any]:
    return train_case(folder, *faults, name=name, steps=STEPS, **changes)


def start(folder: Path, *cases: dict[str, Any]) -> Launch:
    place = folder / "terminal"
    place.mkdir(exist_ok=True)
    return Launch(two_nodes, "ddp", list(cases), place)


def test_a_run_loses_a_node_resumes_and_is_preempted(folder: Path) -> None:
    whole = Launch(fork, "ddp", [case(folder, "whole")], folder)
    assert whole.ended() == 0, whole.text()

    killed = start(folder, case(folder, "run", [1, "signal", 3, "launcher", signal.SIGKILL]))
    assert killed.ended() == 1
    assert "lost contact with another process" in killed.text() or "has ended" in killed.text(), killed.text()

    preempted = start(folder, case(folder, "run", [1, "signal", 5, "itself", signal.SIGUSR1]), case(folder, "run"))
    preempted.ended()
    assert sorted(preempted.codes("run")) == [0, 0, 75, 75], preempted.text()
    assert "resuming from" in preempted.text()
    assert "stopped after step 6 of 8" in preempted.text()
    assert_equal_runs(folder / "run", folder / "whole")


def test_another_config_on_one_node_is_refused_on_both(folder: Path) -> None:
    launch = start(folder, {**case(folder, "other"), "alone": [1, "optimizer.lr=0.5"]})
    launch.ended()
    assert launch.codes("other") == [2, 2]
    assert "error: optimizer.lr: is 0.01 on process 0, but 0.5 on process 1" in launch.text()
