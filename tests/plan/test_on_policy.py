"""Stage 2: the parts of a step against torch's own count of real ones, and the networks that a plan knows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from anyflow_train.config.compose import compose
from anyflow_train.config.network import Architecture
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.parameters import count_parameters
from anyflow_train.config.rollouts import rollout_calls
from anyflow_train.config.run import RunConfig
from anyflow_train.flow.draw import Draw
from anyflow_train.models.build import build_network
from anyflow_train.plan.memory import plan_memory
from anyflow_train.plan.networks import run_networks, stored_architecture
from anyflow_train.plan.parts import Part
from anyflow_train.plan.work import step_parts
from tests.plan.steps import counted

STUDENT = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 40,
    "num_layers": 1,
    "rope_max_seq_len": 16,
}
TEACHER = {**STUDENT, "num_layers": 2, "ffn_dim": 56}
TEXT = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("networks")
    for name, arguments in (("student", STUDENT), ("teacher", TEACHER)):
        build_network(arguments, 0).save_pretrained(place / name)
    return place


# Each role has a network of its own.
OWN = "on_policy.fake_score.adapter={kind: full}"


def small(folder: Path, *overrides: str) -> RunConfig:
    """Two steps; its rollouts have two jumps, whatever is drawn, and no text is dropped: every step costs the same."""
    given = [f"student.architecture.{name}={value}" for name, value in STUDENT.items()]
    given += [f"student.init={folder / 'student'}", f"teacher.source={folder / 'teacher'}", "teacher.codec=none"]
    given += ["data.frames=9", "data.height=48", "data.width=64", f"data.text_lengths=[{TEXT}]", "evaluation=none"]
    given += ["student.gradient_checkpointing=block"]  # all of it: unfused attention is always done again
    given += ["engine=cpu", "engine.global_batch=4", "engine.micro_batch=2", "student/adapter=full", "steps=2"]
    given += ["on_policy.steps=[2]", "objective.text_dropout=0", *overrides]
    return compose("train", ["experiment=wan1_3b_on_policy", *given], None, 1)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("on_policy.fake_score.rollout=fresh", "on_policy.guidance_scale=1", "on_policy.first_jump=detached"),
        ("on_policy.fake_score.updates=2", "on_policy.objective_weight=0"),
        ("student.gradient_checkpointing=none", "objective.velocity=teacher"),
    ],
    ids=["as shipped", "fresh and detached", "two turns", "no checkpointing"],
)
def test_operations_are_torchs_count(folder: Path, overrides: tuple[str, ...], unfused: None) -> None:
    """Of two steps in which everybody's turn comes, and g is 0 and 1, as in the plan's means."""
    config = small(folder, *overrides)
    even = next(step for step in range(0, 20, 2) if index_of(config, step) == 0)
    odd = next(step for step in range(1, 20, 2) if index_of(config, step) == 1)
    planned = sum(part.flops for part in step_parts(config, 1))
    assert 2 * planned == pytest.approx(counted(config, (even, odd)), rel=1e-12)


def test_parts() -> None:
    parts = parts_of("experiment=wan1_3b_on_policy", OWN)
    forward = parts["student forward"].flops
    assert parts["rollout, forward"].flops == pytest.approx(calls("experiment=wan1_3b_on_policy") * forward)
    assert parts["score of the teacher, guided"].flops == pytest.approx(2 * parts["score of the fake score"].flops)
    assert "fake score's own rollout" not in parts
    assert all(part.share == 1 for part in parts.values())


def test_turns() -> None:
    """The student's parts come in one of 5 steps; in the other 4 the fake score rolls out for itself."""
    parts = parts_of("experiment=wan1_3b_on_policy", "on_policy.fake_score.updates=5")
    alone = parts_of("experiment=wan1_3b_on_policy")
    shares = {name: part.share for name, part in parts.items()}
    assert shares.pop("fake score's own rollout") == pytest.approx(0.8)
    for name, share in shares.items():
        assert share == pytest.approx(1.0 if name.startswith("fake score,") else 0.2)
        assert parts[name].flops == pytest.approx(share * alone[name].flops)


def test_without_the_objective_no_difference_is_taken() -> None:
    parts = parts_of("experiment=wan1_3b_on_policy", "on_policy.objective_weight=0")
    assert not any("difference" in name or "student" in name for name in parts)


def test_the_size_of_a_network_is_read_where_it_can_be(folder: Path, tmp_path: Path) -> None:
    student, fake, teacher = run_networks(small(folder))
    assert student.architecture.num_layers == 1
    assert (
        (fake.architecture, fake.assumed)
        == (teacher.architecture, False)
        == (Architecture.model_validate(TEACHER), False)
    )
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({**TEACHER, "_class_name": "Wan"}))
    assert stored_architecture(str(tmp_path)) == Architecture.model_validate(TEACHER)
    (tmp_path / "transformer" / "config.json").write_text("[")
    assert stored_architecture(str(tmp_path)) is None


def test_roles_on_one_base_hold_it_once() -> None:
    shared, own = (compose("train", ["experiment=wan1_3b_on_policy", *words], None, 1) for words in ((), (OWN,)))
    base = 4 * count_parameters(shared.student.architecture)
    frozen = [size for name, size in plan_memory(shared, "ddp", 1).state if name.endswith("weights, frozen (float32)")]
    assert frozen == [base, 0, 0]
    frozen = [size for name, size in plan_memory(own, "ddp", 1).state if name.endswith("weights, frozen (float32)")]
    assert frozen == [base, 0, base]


def test_a_published_teacher_is_known_and_another_is_taken_to_be_as_the_student() -> None:
    for source, layers, assumed in (("Wan-AI/Wan2.1-T2V-14B-Diffusers", 40, False), ("some/where", 30, True)):
        config = compose("train", ["experiment=wan1_3b_on_policy", f"teacher.source={source}", OWN], None, 8)
        for network in run_networks(config)[1:]:
            assert (network.architecture.num_layers, network.assumed) == (layers, assumed)
        memory = plan_memory(config, "ddp", 8)
        others = sum(size for name, size in memory.state if name.startswith(("fake score", "teacher")))
        assert memory.assumed == (others if assumed else 0)


@pytest.mark.parametrize(("size", "student"), [("1.3B", "1_3b"), ("14B", "14b")])
def test_published_sizes_are_those_of_the_shipped_students(size: str, student: str) -> None:
    config = compose("train", [f"experiment=wan{student}_forward"], None, 8)
    assert stored_architecture(f"Wan-AI/Wan2.1-T2V-{size}-Diffusers") == config.student.architecture


def parts_of(*overrides: str) -> dict[str, Part]:
    return {part.name: part for part in step_parts(compose("train", list(overrides), None, 8), 8)}


def calls(*overrides: str) -> float:
    settings = compose("train", list(overrides), None, 8).on_policy
    assert isinstance(settings, DistributionMatching)
    return rollout_calls(settings).mean


def index_of(config: RunConfig, step: int) -> int:
    """The g of the student's rollouts, of two."""
    draw = Draw(config.seed, step, (0,), torch.device("cpu")).scoped("distribution matching")
    return int(2 * draw.shared("steps", 2)[1])
