"""Stage 2's rules, and what its shipped experiments say."""

from __future__ import annotations

import json
from typing import Any

import pytest

from anyflow_train.config.compose import compose
from anyflow_train.config.decode import decode
from anyflow_train.config.findings import Finding
from anyflow_train.config.objectives import FlowMap
from anyflow_train.config.on_policy import DistributionMatching
from anyflow_train.config.rules.run import run_errors, run_warnings
from anyflow_train.config.run import RunConfig

LORA = {"kind": "lora"}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    values = json.loads(compose("train", ["experiment=tiny_on_policy"]).model_dump_json())
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        node = values
        for parent in parents:
            node = node[parent]
        node[last] = value
    return values


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        (
            {
                "objective": {"kind": "flow_matching"},
                "times.diffusion_share": 1.0,
                "times.consistency_share": 0.0,
            },
            "objective.kind",
            "choose objective=flow_map",
        ),
        (
            {"teacher.source": None, "teacher.codec": "x", "objective.velocity": "data"},
            "teacher.source",
            "choose on_policy=none",
        ),
        ({"on_policy.score_times.low": 0.99}, "on_policy.score_times.low", "must be below"),
        ({"on_policy.backward": "chunk"}, "on_policy.backward", "requires a causal student"),
        ({"on_policy.fake_score.times.high": 0.0}, "on_policy.fake_score.times.low", "must be below"),
        ({"on_policy.calls": [1]}, "on_policy.calls", "above 1"),
        ({"on_policy.fake_score.adapter": LORA}, "on_policy.fake_score.adapter", "student/adapter=lora"),
        (
            {"on_policy.fake_score.adapter": LORA, "student.adapter": LORA, "on_policy.fake_score.init": "another"},
            "on_policy.fake_score.init",
            "must be equal to teacher.source",
        ),
    ],
)
def test_errors(changes: dict[str, Any], key: str, words: str) -> None:
    def rules(config: RunConfig) -> list[Finding]:
        return run_errors(config, 1)

    _, errors = decode(RunConfig, changed(changes), rules, {}, dict)
    assert [error.where for error in errors] == [key]
    assert words in errors[0].problem


def test_a_run_that_ends_between_turns_is_warned_of() -> None:
    values = changed({"on_policy.fake_score.updates": 3, "steps": 200})
    (warning,) = run_warnings(RunConfig.model_validate_json(json.dumps(values)), 1)
    assert warning.keys[0] == "steps"
    assert "not a multiple" in warning.text


@pytest.mark.parametrize("start", [None, "teacher"])
def test_a_student_that_stage_1_has_not_seen_is_warned_of(start: str | None) -> None:
    values = changed({"student.init": start, "teacher.source": "teacher"})
    (warning,) = run_warnings(RunConfig.model_validate_json(json.dumps(values)), 1)
    assert warning.keys[0] == "student.init"
    assert "the run of stage 1" in warning.text


@pytest.mark.parametrize("size", ["1_3b", "14b"])
@pytest.mark.parametrize("twin", ["", "_reference"])
def test_published_hyperparameters(size: str, twin: str) -> None:
    """AnyFlow's on-policy stage; k = 3 is w = 4."""
    config: RunConfig = compose("train", [f"experiment=wan{size}_on_policy{twin}"])
    on_policy, optimizer = config.on_policy, config.optimizer
    assert isinstance(on_policy, DistributionMatching)
    assert on_policy.calls == (2, 4, 8, 16, 50)
    assert (on_policy.guidance_scale, on_policy.weight, on_policy.objective_weight) == (4.0, 1.0, 1.0)
    assert (on_policy.fake_score.updates, on_policy.fake_score.lr) == (1, 2e-6)
    assert (on_policy.score_times.distribution, on_policy.fake_score.times.distribution) == ("uniform", "logit_normal")
    assert (config.steps, optimizer.lr, optimizer.betas, optimizer.warmup_steps) == (1200, 2e-6, (0.0, 0.999), 0)
    assert (optimizer.ema.decay, optimizer.ema.start_step) == (0.99, 200)


@pytest.mark.parametrize("name", ["tiny", "wan1_3b", "wan14b"])
def test_twins_hold_the_published_choices(name: str) -> None:
    config: RunConfig = compose("train", [f"experiment={name}_on_policy_reference"])
    on_policy, objective = config.on_policy, config.objective
    assert isinstance(on_policy, DistributionMatching)
    assert isinstance(objective, FlowMap)
    assert (on_policy.fake_score.rollout, on_policy.first_jump) == ("fresh", "gradient")
    assert (on_policy.score_times.low, on_policy.score_times.high) == (0.0, 1.0)
    assert (objective.guidance, objective.derivative_ends, objective.derivative_precision) == (
        "prediction",
        "free",
        "bf16",
    )
    assert config.times.precision == "bf16"
