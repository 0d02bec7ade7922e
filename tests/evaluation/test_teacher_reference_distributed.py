"""Two processes share the teacher's solutions, and validate as one process does; stages change on both at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from anyflow_train.config.compose import compose
from anyflow_train.evaluation.validation import build_validator
from anyflow_train.training import run as training
from tests.training.helpers import settings, write_latents, write_networks
from tests.training.launched import Launch, fork
from tests.training.words import words

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

ENGINES = ("ddp", "zero3")


def config(folder: Path, name: str) -> dict[str, Any]:
    """Four steps in two stages; five samples in batches of two: one process solves one batch more than it needs."""
    run = settings(folder, name=name, steps=4, engine__micro_batch=2, optimizer__lr=1e-3)
    run["student"] |= {"init": str(folder / "network"), "time_frequency_limit": None}
    run["teacher"] = {"source": str(folder / "teacher"), "codec": "none"}
    run["objective"]["schedule"] = [{"changes": {"objective.epsilon": 0.05}, "steps": 2}]
    run["evaluation"] = {"every": 2, "reference": "teacher", "reference_calls": 4, "reference_videos": 0}
    run["evaluation"] |= {"calls": [1, 2], "samples": 5, "batch": 2, "videos": 0, "best_metric": "rms_2"}
    return run


def metrics(run: Path) -> dict[tuple[int, str], float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(row["step"], name): row[name] for row in rows for name in row if name.startswith(("validation/", "loss"))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a run of one process, and one of two processes for each engine, named after it."""
    folder = tmp_path_factory.mktemp("reference")
    write_latents(folder / "shards")
    write_networks(folder)
    launch = Launch(fork, "zero3", [{"engine": engine, "config": config(folder, engine)} for engine in ENGINES], folder)
    assert launch.ended() == 0, launch.text()
    assert training.run(compose("train", words(config(folder, "one"))), build_validator) == 0
    return folder


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_validate_as_one(runs: Path, engine: str) -> None:
    for row in range(5):
        name = f"teacher_reference/{row:05d}.safetensors"
        one, two = (load_file(runs / run / name)["latents"] for run in ("one", engine))
        assert (one - two).abs().max() < 1e-5
    expected = metrics(runs / "one")
    assert {step for step, name in expected if name == "validation/rms_2"} == {2, 4}
    assert metrics(runs / engine) == pytest.approx(expected, rel=1e-4, abs=1e-6)
