"""All three stages on a world that takes a minute: what each of them must bring, measured against real clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.evaluation.load import load_student, load_teacher
from anyflow_train.evaluation.metrics import energy_distance
from anyflow_train.export.weights import to_wan
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.sampler import sample
from anyflow_train.flow.types import Condition
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.training import run as training
from anyflow_train.training.networks import load_trained_network
from tests.training import waves

# The fixture trains for a minute and a half on a quiet core.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SAMPLES = 512
ARCHITECTURE = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": waves.SHAPE[1],
    "out_channels": waves.SHAPE[1],
    "text_dim": waves.TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 128,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}


def settings(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "out": str(folder),
        "log_every": 50,
        "student": {"architecture": ARCHITECTURE},
        "data": {
            "shards": str(folder / "shards"),
            "frames": 9,
            "height": 32,
            "width": 32,
            "text_lengths": [2],
            "workers": 0,
        },
        "engine": {"device": "cpu", "precision": "fp32", "global_batch": 32, "micro_batch": 32, "threads": 1},
        "checkpoint": {"every": 10_000},
        "evaluation": {"every": 0},
        **changes,
    }


def optimizer(rate: float, decay: float, **changes: Any) -> dict[str, Any]:
    schedule = {"schedule": "cosine", "final_lr_share": 0.02, "warmup_steps": 20}
    return {"lr": rate, **schedule, "ema": {"decay": decay, "start_step": 0}, **changes}


def trained(config: dict[str, Any]) -> Path:
    assert training.run(RunConfig.model_validate(config)) == 0
    network = load_trained_network(Path(config["out"]) / config["name"])
    folder = Path(config["out"]) / f"{config['name']}-network"
    (to_wan(network) if config["student"].get("gate_value") == 0 else network).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, its student after stage 1, and after stage 2 with and without stage 1 beside it."""
    folder = tmp_path_factory.mktemp("waves")
    waves.write(folder / "shards", 2048, seed=1)
    teacher = settings(
        folder, "teacher", steps=1500, objective={"kind": "flow_matching"}, optimizer=optimizer(3e-3, 0.995)
    )
    teacher["student"] |= {"gate_value": 0.0, "time_frequency_limit": 0.03}
    teacher["times"] = {"diffusion_share": 1.0, "consistency_share": 0.0}
    source = trained(teacher)
    flow_map = {"kind": "flow_map", "derivative_network": "ema", "epsilon": 0.02}
    first = settings(folder, "first", steps=600, objective=flow_map, optimizer=optimizer(1e-3, 0.99))
    first["student"] = first["student"] | {"init": str(source)}
    student = trained(first)
    found = {"teacher": source, "first": student}
    for name, weight in (("second", 1.0), ("alone", 0.0)):
        second = settings(folder, name, steps=120, objective=flow_map, teacher={"source": str(source)})
        second["student"] = second["student"] | {"init": str(student)}
        second["optimizer"] = optimizer(2e-4, 0.97, betas=(0.0, 0.999), warmup_steps=0)
        fake = {"init": str(source), "lr": 5e-4}
        second["on_policy"] = {
            "kind": "distribution_matching",
            "steps": [2, 4, 8],
            "objective_weight": weight,
            "fake_score": fake,
        }
        found[name] = trained(second)
    return found


@pytest.fixture(scope="module")
def clips(stages: dict[str, Path]) -> dict[str, dict[int, torch.Tensor]]:
    """Samples from the same noise at several numbers of calls; the teacher's are Euler steps."""
    labels = torch.arange(SAMPLES) % waves.CLASSES
    condition = Condition(waves.texts()[0][labels])
    z = Draw(3, 0, tuple(range(SAMPLES)), torch.device("cpu")).normal("noise", waves.SHAPE)
    found = {}
    for name, folder in stages.items():
        network = (load_teacher if name == "teacher" else load_student)(folder).network
        flow_map = NetworkFlowMap(network.eval().requires_grad_(False), None)
        found[name] = {calls: sample(flow_map, z, condition, calls, 5.0) for calls in (1, 2, 4, 8, 16, 32)}
    return found


@pytest.fixture(scope="module")
def energy(clips: dict[str, dict[int, torch.Tensor]]) -> dict[str, dict[int, float]]:
    """Unbiased energy distance to real clips; between two sets of those it is 0 +- .03."""
    real, _ = waves.draw(2048, seed=2)
    found = {name: {n: energy_distance(x, real) for n, x in by_calls.items()} for name, by_calls in clips.items()}
    labels = torch.arange(SAMPLES) % waves.CLASSES
    for name, by_calls in clips.items():
        off = {n: waves.off_ring(x, labels) for n, x in by_calls.items()}
        print(name, *(f"{n} calls: {found[name][n]:.3f}, off ring {off[n]:.3f};" for n in by_calls))
    return found


def test_the_world_knows_its_clips() -> None:
    real, labels = waves.draw(64, seed=3)
    assert waves.off_ring(real, labels) < 1e-5  # float32
    assert waves.accuracy(real, labels) == 1
    assert real.var().item() == pytest.approx(1, abs=0.1)


def test_the_teacher_needs_many_calls(energy: dict[str, dict[int, float]]) -> None:
    teacher = energy["teacher"]
    assert teacher[1] > teacher[2] > teacher[4] > teacher[32]
    assert teacher[32] < 0.15 < 0.8 < teacher[2]


def test_stage_1_makes_few_calls_good(energy: dict[str, dict[int, float]]) -> None:
    teacher, student = energy["teacher"], energy["first"]
    assert student[1] < 0.1 * teacher[1]
    assert student[2] < 0.25 * teacher[2]
    assert student[4] < 0.5 * teacher[4]


def test_stage_2_reaches_the_teacher_s_best_from_2_calls_on_and_stays_any_step(
    energy: dict[str, dict[int, float]], clips: dict[str, dict[int, torch.Tensor]]
) -> None:
    teacher, student = energy["teacher"], energy["second"]
    for calls in (2, 4, 8, 16):
        assert student[calls] < teacher[32] + 0.06  # twice the measure's noise
    labels = torch.arange(SAMPLES) % waves.CLASSES
    assert waves.accuracy(clips["second"][4], labels) > 0.99
    for calls in (1, 2, 4):
        assert waves.off_ring(clips["second"][calls], labels) < waves.off_ring(clips["first"][calls], labels)
    assert waves.off_ring(clips["second"][4], labels) < 0.75 * waves.off_ring(clips["teacher"][4], labels)


def test_without_stage_1_beside_it_a_number_of_calls_that_no_rollout_takes_is_forgotten(
    energy: dict[str, dict[int, float]],
) -> None:
    """Rollouts of 2 steps and more never jump from noise to data at once."""
    assert energy["second"][1] < energy["first"][1] < 0.75 * energy["alone"][1]
