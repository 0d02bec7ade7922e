"""Everything that can go wrong with one of two processes, done to real launches."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.training.checkpoint import list_checkpoints, read_info
from tests.training.helpers import final_tensors, write_latents
from tests.training.launched import Launch, train_case

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 30
KILLED: dict[str, Any] = {"steps": STEPS, "checkpoint__every": 4, "log_every": 1}
# Seconds within which a process that hangs is reported. A step takes 0.1 s, but other tests may want the processor.
TIMEOUT = 10
HANGING: dict[str, Any] = {"steps": 100_000, "checkpoint__every": 100_000, "engine__timeout_seconds": TIMEOUT}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data, and every run of this module."""
    folder = tmp_path_factory.mktemp("faults")
    write_latents(folder / "shards")
    write_latents(folder / "poisoned", samples=40, poison=(7,))
    write_latents(folder / "others", samples=21)
    return folder


@pytest.fixture(scope="module", params=["ddp", "zero2"])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def launch(folder: Path, engine: str) -> Iterator[Launch]:
    """One launch that goes through all that a process survives."""
    place = folder / engine
    place.mkdir()

    def case(name: str, **changes: Any) -> dict[str, Any]:
        return train_case(place, name=name, **{"data__shards": str(folder / "shards"), **changes})

    poisoned = {"data__shards": str(folder / "poisoned"), "steps": 5}
    endless = {"steps": 1000, "checkpoint__every": 1000}
    cases = [
        case("whole", **KILLED),
        {**case("full"), "room": [0, 4, 10_000]},
        {**case("config"), "alone": {"1": ["seed=7", "engine.precision=bf16"]}},
        {**case("manifest"), "alone": {"1": [f"data.shards={folder / 'others'}"]}},
        {**case("preempted", **endless), "signal": [1, 3, signal.SIGUSR1]},
        {**case("stopped", **endless), "signal": [0, 3, signal.SIGTERM]},
        case("poisoned", **poisoned),
        case("poisoned_bf16", engine__precision="bf16", **poisoned),
        {**case("damaged"), "flip": "exp_avg-00001.safetensors"},
    ]
    launch = Launch(engine, cases, place)
    launch.ended()
    yield launch


def last(run: Path) -> Path:
    return list_checkpoints(run / "checkpoints")[-1]


def test_one_terminal_and_one_log_a_process(launch: Launch) -> None:
    assert launch.codes()[0] == (0, 0)
    log = (launch.folder / "whole" / "logs" / "process_00001.txt").read_text()
    assert log.startswith("== 20")
    assert "pid" in log.splitlines()[0]
    assert f"step {STEPS}/{STEPS}" in log
    first = launch.text().split(f"finished {STEPS} steps")[0]
    assert first.count(f"step {STEPS}/{STEPS}") == 1
