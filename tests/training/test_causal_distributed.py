"""Both stages of a causal student on two processes are those of one.

An odd step out shows itself here: of parameters that a step does not reach, no gradient of an earlier step may be left.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anyflow_train.config.compose import compose
from anyflow_train.training import run as training
from tests.conftest import asked_for, with_nightly
from tests.training.helpers import causal, final_tensors, settings, write_latents, write_networks
from tests.training.launched import Launch, fork
from tests.training.words import words

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS = 6
# Stage, engine, micro-batch. The patches of the context are trained in some of the steps only.
RUNS = {
    "1-zero2": (1, "zero2", 4),
    "1-zero3": (1, "zero3", 2),
    "1-offload": (1, "zero3_offload", 4),
    "2-zero2": (2, "zero2", 2),
    "2-zero3": (2, "zero3", 4),
}
# Opposite corners stay: the other stage has the engine, the other engine has the stage, and both have run in one role.
NIGHTLY = ("1-zero3", "1-offload", "2-zero2")


def config(folder: Path, name: str, stage: int, micro_batch: int) -> dict[str, Any]:
    # At the other tests' rate of 1e-2 the losses of this network double a rounding error every step.
    changes = {"steps": STEPS, "optimizer__lr": 1e-3, "checkpoint__every": STEPS, "engine__micro_batch": micro_batch}
    run = causal(settings(folder, name=name, **changes))
    run["student"] |= {"init": str(folder / "network"), "time_frequency_limit": None}
    if stage == 2:
        run["teacher"] = {"source": str(folder / "teacher")}
        fake = {"init": str(folder / "teacher"), "lr": 2e-3, "rollout": "student"}
        run["on_policy"] = {"kind": "distribution_matching", "calls": [1, 2], "fake_score": fake}
        # One process keeps the graph of the whole clip.
        run["on_policy"]["backward"] = "chunk" if name == "2-zero3" else "clip"
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("causal")
    write_latents(folder / "shards", frames=3)
    write_networks(folder)
    for stage in (1, 2):
        assert training.run(compose("train", words(config(folder, f"{stage}-one", stage, 8)))) == 0
    wanted = {name: RUNS[name] for name in asked_for(request, "name", RUNS)}
    cases = [
        {"engine": engine, "config": config(folder, name, s, micro)} for name, (s, engine, micro) in wanted.items()
    ]
    place = folder / "launch"
    place.mkdir()
    launch = Launch(fork, "zero2", cases, place)
    assert launch.ended() == 0, launch.text()
    return folder


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", with_nightly(RUNS, NIGHTLY))
def test_a_run_of_two_processes_is_that_of_one(runs: Path, name: str) -> None:
    one = runs / f"{RUNS[name][0]}-one"
    for row, wanted in zip(logged(runs / name), logged(one), strict=True):
        kept = [key for key in wanted if "loss" in key or "norm" in key]
        assert [key for key in row if "loss" in key or "norm" in key] == kept  # the same terms, chunks and jumps
        for key in kept:
            # float32 sums in another order, over some steps of training; absolute where the loss begins at 0
            assert row[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-9), key
    ours, wanted = final_tensors(runs / name), final_tensors(one)
    assert ours.keys() == wanted.keys()
    for key, tensor in ours.items():
        # as for one role: float32 sums in another order, magnified by Adam
        assert (tensor - wanted[key]).norm() <= 1e-4 * wanted[key].norm(), key
