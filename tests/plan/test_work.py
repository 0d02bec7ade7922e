"""Which forwards and backwards a step is planned to make."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from anyflow_train.config.compose import compose
from anyflow_train.config.rows import Rows
from anyflow_train.config.run import RunConfig
from anyflow_train.plan.gpus import GPUS
from anyflow_train.plan.parts import Part
from anyflow_train.plan.products import forward_products
from anyflow_train.plan.work import step_parts, step_seconds

WORLD = 8


def parts_of(*overrides: str, world: int = WORLD) -> dict[str, Part]:
    config: RunConfig = compose("train", list(overrides), None, world)
    return {part.name: part for part in step_parts(config, world)}


def samples(parts: dict[str, Part]) -> dict[str, float]:
    return {name: part.samples for name, part in parts.items()}


def test_stage_1() -> None:
    """Only the samples with r < t take the difference. Guidance is one forward more of those that have a text, or of
    one of two where neither has; checkpointing is another of all."""
    parts = parts_of("experiment=wan1_3b_forward")
    assert samples(parts) == {
        "student forward": 32,
        "backward": 32,
        "recomputed by gradient checkpointing": 32,
        "teacher's velocity": 32,
        "guidance, by the teacher": pytest.approx(32 * 0.9),
        "guidance, by the teacher, needless": pytest.approx(16 * 0.1**2),
        "two difference forwards, r < t": 16,
    }
    assert parts["two difference forwards, r < t"].flops == parts["student forward"].flops
    assert parts["two difference forwards, r < t"].precision == "fp16"
    assert not parts["recomputed by gradient checkpointing"].counts


def test_the_negative_prompt_is_asked_for_by_samples_with_a_text_or_by_one() -> None:
    """Against all patterns of dropped texts in a micro-batch of 3."""
    parts = parts_of("experiment=wan1_3b_forward", "engine.micro_batch=3", "engine.global_batch=24")
    patterns = product((0, 1), repeat=3)
    mean = sum(0.1 ** sum(gone) * 0.9 ** (3 - sum(gone)) * max(3 - sum(gone), 1) for gone in patterns)
    asked, needless = (parts[f"guidance, by the teacher{rest}"] for rest in ("", ", needless"))
    assert asked.samples + needless.samples == pytest.approx(8 * mean)
    assert asked.counts
    assert not needless.counts


def test_samples_that_do_not_come_out_even_are_named() -> None:
    """Micro-batch 1 and one micro-step: every process must run the differences, also for its diffusion samples."""
    parts = parts_of("experiment=wan1_3b_forward", "engine.micro_batch=1", world=32)
    assert parts["two difference forwards, needless"].samples == 16
    assert not parts["two difference forwards, needless"].counts


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ("objective.velocity=data", {"guidance, by the student"}),
        ("objective.guidance=target", {"teacher's velocity", "guidance, by the teacher"}),
        ("objective.guidance=prediction", {"teacher's velocity", "guidance, by the student"}),
    ],
)
def test_forwards_of_the_objective(objective: str, expected: set[str]) -> None:
    parts = parts_of("experiment=wan1_3b_forward", objective)
    assert {name for name in parts if ("teacher" in name or "guidance" in name) and "needless" not in name} == expected


def test_stage_0_has_no_differences() -> None:
    parts = parts_of("experiment=wan1_3b_teacher", "student.gradient_checkpointing=none")
    assert set(parts) == {"student forward", "backward"}


def test_text_lengths_count_as_often_as_they_are_drawn() -> None:
    overrides = ["experiment=wan1_3b_teacher", "data.text_lengths=[64,512,512]"]
    config: Any = compose("train", overrides, None, WORLD)
    short, long = (
        forward_products(config.student.architecture, config.student.adapter, Rows.whole(32_760), length).forward
        for length in (64, 512)
    )
    assert parts_of(*overrides)["student forward"].flops == pytest.approx(32 * (short + 2 * long) / 3, rel=1e-12)


def test_seconds_by_precision() -> None:
    parts = [Part("a", 1, 989e12, "bf16"), Part("b", 1, 66.9e12, "fp32")]
    assert step_seconds(parts, GPUS["h100-80"], 2, 0.5) == pytest.approx({"bf16": 1.0, "fp16": 0.0, "fp32": 1.0})
