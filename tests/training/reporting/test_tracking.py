"""The run's own metrics file, and both trackers without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.config.run import RunConfig
from anyflow_train.training.checkpoints.run_directory import RunDirectory
from anyflow_train.training.reporting.tracking import MetricsFile, Trackers

BASE: dict[str, Any] = {
    "name": "test",
    "steps": 10,
    "student": {"architecture": {}},
    "objective": {"kind": "flow_map"},
    "data": {"shards": "shards", "frames": 1, "height": 16, "width": 16},
}


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_resumed_run_has_one_line_a_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.log(step, {"loss": 0.5}, {})
    file.close()
    with path.open("a") as cut:
        cut.write('{"step": 4, "lo')
    file = MetricsFile(path, 2)
    file.log(3, {"loss": 0.25}, {})
    file.close()
    assert steps(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[-1])["loss"] == 0.25


@pytest.mark.parametrize(
    ("tracker", "pattern"),
    [
        ({"kind": "tensorboard"}, "tensorboard/events*"),
        ({"kind": "wandb", "mode": "offline"}, "wandb/offline-run-*/*.wandb"),
        ({"kind": "none"}, "metrics.jsonl"),
    ],
)
def test_trackers_write_into_the_run_directory(tmp_path: Path, tracker: dict[str, str], pattern: str) -> None:
    trackers = Trackers(RunConfig.model_validate({**BASE, "tracker": tracker}), RunDirectory(tmp_path), 0)
    trackers.log(1, {"loss": 0.5})
    trackers.close()
    assert len(list(tmp_path.glob(pattern))) == 1
    assert steps(tmp_path / "metrics.jsonl") == [1]
