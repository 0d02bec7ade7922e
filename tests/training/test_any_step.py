"""All three stages on a small world: the quality that each stage must reach, compared with real clips.

A short training shows the order of the three; the nightly tests train to the end, and ask for the quality itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.config.run import RunConfig
from anyflow_train.evaluation.load import load_student, load_teacher
from anyflow_train.export.weights import to_wan
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.sampler import sample
from anyflow_train.flow.types import Condition
from anyflow_train.models.backbone import Backbone
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.training import run as training
from anyflow_train.training.networks import load_trained_network
from tests.evaluation.distances import energy_distance
from tests.training import waves

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SAMPLES = 512
LABELS = torch.arange(SAMPLES) % waves.CLASSES
FLOW_MAP = {"kind": "flow_map", "derivative_network": "ema", "epsilon": 0.02}
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


@dataclass(frozen=True)
class Stages:
    """A folder with clips, a teacher, and its student after stage 1: networks in diffusers' layout."""

    folder: Path
    teacher: Path
    first: Path


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return first_stages(tmp_path_factory.mktemp("waves"), (1500, 0.995), (600, 0.99))


def first_stages(folder: Path, of_teacher: tuple[int, float], of_student: tuple[int, float]) -> Stages:
    """Train a teacher and stage 1 of its student, each for so many steps with this decay of the averages."""
    waves.write(folder / "shards", 2048, seed=1)
    steps, decay = of_teacher
    teacher = settings(
        folder, "teacher", steps=steps, objective={"kind": "flow_matching"}, optimizer=optimizer(3e-3, decay)
    )
    teacher["student"] |= {"gate_value": 0.0, "time_frequency_limit": 0.03}
    teacher["times"] = {"diffusion_share": 1.0, "consistency_share": 0.0}
    source = trained(teacher)
    steps, decay = of_student
    first = settings(folder, "first", steps=steps, objective=FLOW_MAP, optimizer=optimizer(1e-3, decay))
    first["student"] = first["student"] | {"init": str(source)}
    return Stages(folder, source, trained(first))


def second_stage(stages: Stages, name: str, objective_weight: float, steps: int = 120) -> Path:
    """Train stage 2, with the objective of stage 1 at a weight. Returns the network's folder."""
    second = settings(stages.folder, name, steps=steps, objective=FLOW_MAP, teacher={"source": str(stages.teacher)})
    second["student"] = second["student"] | {"init": str(stages.first)}
    second["optimizer"] = optimizer(2e-4, 0.97, betas=(0.0, 0.999), warmup_steps=0)
    second["on_policy"] = {
        "kind": "distribution_matching",
        "calls": [2, 4, 8],
        "objective_weight": objective_weight,
        "fake_score": {"init": str(stages.teacher), "lr": 5e-4},
    }
    return trained(second)


Clips = dict[int, torch.Tensor]


def draw_clips(network: Backbone, calls: tuple[int, ...]) -> Clips:
    """Sample from the same noise at several numbers of calls. A teacher's calls are Euler steps."""
    condition = Condition(waves.texts()[0][LABELS])
    z = Draw(3, 0, tuple(range(SAMPLES)), torch.device("cpu")).normal("noise", waves.SHAPE)
    flow_map = NetworkFlowMap(network.eval().requires_grad_(False), None)
    return {count: sample(flow_map, z, condition, count, 5.0) for count in calls}


def measure(clips: Clips) -> dict[int, float]:
    """Return the unbiased energy distance to real clips; between two sets of real clips it is 0 +- 0.03."""
    real, _ = waves.draw(2048, seed=2)
    return {calls: energy_distance(x, real) for calls, x in clips.items()}


@pytest.fixture(scope="module")
def teacher(stages: Stages) -> Clips:
    return draw_clips(load_teacher(stages.teacher).network, (1, 2, 4, 32))


@pytest.fixture(scope="module")
def first(stages: Stages) -> Clips:
    return draw_clips(load_student(stages.first).network, (1, 2, 4))


@pytest.fixture(scope="module")
def second(stages: Stages) -> Clips:
    return draw_clips(load_student(second_stage(stages, "second", 1.0)).network, (1, 2, 4, 8, 16))


def test_the_world_knows_its_clips() -> None:
    real, labels = waves.draw(64, seed=3)
    assert waves.off_ring(real, labels) < 1e-5  # float32
    assert waves.accuracy(real, labels) == 1
    assert real.var().item() == pytest.approx(1, abs=0.1)


def test_every_stage_makes_few_calls_better(tmp_path: Path) -> None:
    """After a fifth of the steps of the tests below, with wide bounds."""
    short = first_stages(tmp_path, (300, 0.98), (150, 0.97))
    networks = {
        "teacher": load_teacher(short.teacher).network,
        "first": load_student(short.first).network,
        "second": load_student(second_stage(short, "second", 1.0, 40)).network,
    }
    teacher, first, second = (measure(draw_clips(network, (1, 2, 4, 16))) for network in networks.values())
    assert teacher[1] > teacher[2] > teacher[4] > teacher[16]
    assert first[1] < 0.5 * teacher[1]
    assert first[2] < 0.8 * teacher[2]
    assert all(second[calls] < 0.75 * first[calls] for calls in (1, 2, 4))
    assert second[4] < 0.75 * teacher[4]
    assert second[16] < second[1]  # it stays any-step


@pytest.mark.nightly
def test_the_teacher_needs_many_calls(teacher: Clips) -> None:
    energy = measure(teacher)
    assert energy[1] > energy[2] > energy[4] > energy[32]
    assert energy[32] < 0.15 < 0.8 < energy[2]


@pytest.mark.nightly
def test_stage_1_makes_few_calls_good(teacher: Clips, first: Clips) -> None:
    start, student = measure(teacher), measure(first)
    assert student[1] < 0.1 * start[1]
    assert student[2] < 0.25 * start[2]
    assert student[4] < 0.5 * start[4]


@pytest.mark.nightly
def test_stage_2_reaches_the_teacher_s_best_from_2_calls_on_and_stays_any_step(
    teacher: Clips, first: Clips, second: Clips
) -> None:
    best, student = measure(teacher)[32], measure(second)
    for calls in (2, 4, 8, 16):
        assert student[calls] < best + 0.06  # twice the measure's noise
    assert waves.accuracy(second[4], LABELS) > 0.99
    off, before = ({n: waves.off_ring(clips[n], LABELS) for n in (1, 2, 4)} for clips in (second, first))
    assert all(off[calls] < before[calls] for calls in off)
    assert off[4] < 0.75 * waves.off_ring(teacher[4], LABELS)


@pytest.mark.nightly
def test_without_stage_1_beside_it_a_number_of_calls_that_no_rollout_takes_is_forgotten(
    stages: Stages, first: Clips, second: Clips
) -> None:
    """Rollouts of 2 steps and more never jump from noise to data at once."""
    alone = draw_clips(load_student(second_stage(stages, "alone", 0.0)).network, (1,))
    assert measure(second)[1] < measure(first)[1] < 0.75 * measure(alone)[1]
