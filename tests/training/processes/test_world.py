"""The processes of a run: ranks, devices and agreement, before they train."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed import TCPStore

from anyflow_train.config.run import Engine as EngineConfig
from anyflow_train.errors import UserError
from anyflow_train.training.processes.world import agree_on_start, start_world
from tests.training.helpers import settings, write_latents
from tests.training.words import ROOT, words


def test_half_a_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE: is 2"):
        start_world(EngineConfig(device="cpu"))


def test_a_word_for_a_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="'two'"):
        start_world(EngineConfig(device="cpu"))


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"engine\.device"):
        start_world(EngineConfig(device="cuda"))


def test_port_0_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torchrun --master-port 0` gives its processes this port, at which nothing answers."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_PORT: is 0.*--standalone"):
        start_world(EngineConfig(device="cpu"))


def test_a_port_at_which_nothing_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"MASTER_ADDR: .* at 127\.0\.0\.1:9 within 1 s"):
        start_world(EngineConfig(device="cpu", timeout_seconds=1))


def test_every_start_on_a_store_has_its_own_name() -> None:
    """A launcher that restarts its processes keeps its store, with what the ended processes wrote."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))
    stores = [TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=120)) for _ in range(3)]
    store.set("here/2", "the word of a process that ended before process 0 came")
    store.get("here/2")  # `set` does not wait for the store, so the word could arrive after that of the new process
    names = []
    with ThreadPoolExecutor(3) as threads:
        for _ in range(2):
            found = list(threads.map(lambda rank: agree_on_start(stores[rank], rank, 3, 120), (2, 1, 0)))
            assert len(set(found)) == 1
            names.append(found[0])
    assert names[0] != names[1]


def test_a_process_that_does_not_come_is_named() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("here/1", "an earlier process")
    store.get("here/1")
    with pytest.raises(UserError, match="WORLD_SIZE: is 3, but process 1, 2 did not start within 0 s"):
        agree_on_start(store, 0, 3, 0.1)


@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_launcher_that_restarts_killed_processes_resumes_the_run(tmp_path: Path, rank: int) -> None:
    write_latents(tmp_path / "shards")
    config = settings(tmp_path, engine__micro_batch=2, steps=40, checkpoint__every=5)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (tmp_path / "terminal.txt").open("w+") as log:
        command = [*torchrun, "-m", "anyflow_train", "train", *words(config)]
        launcher = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        saved = tmp_path / "run" / "checkpoints" / "step_00000005"
        deadline = time.monotonic() + 240
        while not saved.is_dir():
            assert launcher.poll() is None, log.seek(0) or log.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        workers = psutil.Process(launcher.pid).children()
        next(worker for worker in workers if worker.environ()["RANK"] == str(rank)).send_signal(signal.SIGKILL)
        code = launcher.wait(240)
        log.seek(0)
        text = log.read()
    assert code == 0, text
    assert "resuming from" in text
    assert "finished 40 steps" in text
