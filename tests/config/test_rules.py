"""Each rule names the dotted key that fixes it; nothing else is reported beside."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import pytest

from anyflow_train.config.base import Model
from anyflow_train.config.commands import EvaluateConfig, PrepareConfig, SampleConfig
from anyflow_train.config.compose import compose
from anyflow_train.config.decode import decode
from anyflow_train.config.findings import Finding
from anyflow_train.config.rules import commands
from anyflow_train.config.rules.run import run_errors, run_warnings
from anyflow_train.config.run import RunConfig

WHOLE = {"kind": "flow_matching", "guidance": "none", "guidance_scale": 1.0, "text_dropout": 0.1}
LORA = {"kind": "lora"}
EIGHT_BITS = {"engine.fp8": "frozen", "engine.precision": "bf16", "student.adapter": LORA}
TAUGHT = {"evaluation.reference": "teacher", "evaluation.held_out": None}
# What the cases below start from, whatever the experiment is tuned to.
BASE: dict[str, Any] = {
    "steps": 800,
    "student.adapter": {"kind": "full"},
    "times.diffusion_share": 0.5,
    "times.consistency_share": 0.25,
    "times.shift": 5.0,
    "objective.rebalance": "weighted",
    "objective.velocity": "data",
    "engine.global_batch": 32,
    "engine.micro_batch": 32,
    "optimizer.schedule": "cosine",
    "optimizer.final_lr_share": 0.02,
    "optimizer.warmup_steps": 50,
    "optimizer.ema.start_step": 0,
    "evaluation.every": 200,
    "evaluation.calls": [1, 2, 4, 8],
    "evaluation.best_metric": "energy_distance_4",
    "evaluation.shift": 5.0,
    "evaluation.oracle": "shapes",
    "evaluation.videos": 4,
}


def stage(changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"steps": 10, "changes": changes}]


@cache
def saved(experiment: str) -> str:
    chosen = ["objective=flow_map"] if experiment == "tiny" else []
    return compose("train", [f"experiment={experiment}", *chosen]).model_dump_json()


def changed(changes: dict[str, Any], experiment: str = "tiny") -> dict[str, Any]:
    values = json.loads(saved(experiment))
    for dotted, value in (BASE | changes).items():
        *parents, last = dotted.split(".")
        node = values
        for parent in parents:
            node = node[parent]
        node[last] = value
    return values


def found(model: type[Model], values: dict[str, Any], rules: Callable[[Any], Iterable[Finding]]) -> dict[str, str]:
    _, errors = decode(model, values, rules, {}, dict)
    return {error.where: error.problem for error in errors}


CASES: list[tuple[dict[str, Any], str, str]] = [
    # Shares and branches.
    ({"times.diffusion_share": 0.9}, "times.consistency_share", "add up to 1.15"),
    ({"times.diffusion_share": 1.0, "times.consistency_share": 0.0}, "times.diffusion_share", "no samples with r < t"),
    (
        {"engine.global_batch": 2, "engine.micro_batch": 2},
        "engine.global_batch",
        "require free samples; the next possible size is 4",
    ),
    (
        {"engine.global_batch": 1, "engine.micro_batch": 1},
        "engine.global_batch",
        "require consistency and free samples; the next possible size is 4",
    ),
    ({"times.diffusion_share": 0.0}, "objective.rebalance", "set objective.rebalance=none"),
    # Times and network.
    ({"times.distribution": "logit_normal"}, "times.distribution", "set times.distribution=uniform"),
    ({"student.gate_value": 0.0}, "student.gate_value", "hides the target time"),
    ({"student.architecture.attention_head_dim": 23}, "student.architecture.attention_head_dim", "even"),
    ({"student.architecture.freq_dim": 63}, "student.architecture.freq_dim", "even"),
    ({"student.architecture.out_channels": 8}, "student.architecture.out_channels", "in_channels=16"),
    ({"engine.fp8": "frozen", "engine.precision": "bf16"}, "engine.fp8", "student/adapter=lora"),
    ({"engine.fp8": "frozen", "student.adapter": LORA}, "engine.fp8", "set that to bf16"),
    ({"engine.frozen_precision": "bf16"}, "engine.frozen_precision", "set it to fp32 or null"),
    (
        EIGHT_BITS | {"objective.derivative_precision": "bf16"},
        "objective.derivative_precision",
        "a third of it would be noise",
    ),
    (EIGHT_BITS | {"student.architecture.ffn_dim": 392}, "engine.fp8", "is 392;"),
    (
        EIGHT_BITS | {"student.architecture.num_attention_heads": 3, "student.architecture.attention_head_dim": 10},
        "engine.fp8",
        "is 30;",
    ),
    ({"student.init": None, "student.adapter": LORA}, "student.adapter", "student/adapter=full"),
    ({"student.time_frequency_limit": 0.1}, "student.time_frequency_limit", "=null"),
    # Adapters.
    ({"student.adapter": LORA | {"targets": []}}, "student.adapter.targets", "is empty"),
    ({"student.adapter": LORA | {"targets": ["attn1.to_qq"]}}, "student.adapter.targets", "nearest is 'attn1.to_q'"),
    ({"student.adapter": LORA | {"targets": ["patch_embedding"]}}, "student.adapter.targets", "no linear layer"),
    (
        {"student.adapter": LORA | {"full_modules": ["delta_embeder"]}},
        "student.adapter.full_modules",
        "nearest is 'delta_embedder'",
    ),
    (
        {"student.adapter": LORA | {"full_modules": ["ffn"]}},
        "student.adapter.full_modules",
        "remove them from one of the two",
    ),
    # Guidance and velocity.
    ({"objective.guidance_scale": 3.0}, "objective.guidance", "prediction or target"),
    ({"objective.guidance": "target"}, "objective.guidance_scale", "set a scale above 1"),
    ({"objective.source": "student", "objective.weight": "uniform"}, "objective.velocity", "set it to teacher"),
    ({"objective.derivative": "jvp", "engine.compile": True}, "objective.derivative", "engine.compile=true"),
    ({"objective.source": "student", "objective.velocity": "teacher"}, "objective.weight", "would train nothing"),
    (
        {"objective.velocity": "teacher", "teacher.source": None, "teacher.codec": "x"},
        "teacher.source",
        "objective.velocity=data",
    ),
    # Sizes.
    ({"data.frames": 18}, "data.frames", "nearest are 17 and 21"),
    ({"data.height": 72}, "data.height", "multiple of 16 (VAE 8 x patch 2); nearest are 64 and 80"),
    ({"data.width": 8}, "data.width", "nearest are 16"),
    ({"student.architecture.patch_size": [2, 2, 2]}, "student.architecture.patch_size", "[1, p, p]"),
    ({"student.architecture.rope_max_seq_len": 4}, "data.frames", "is 5 tokens along this axis"),
    ({"data.width": 1040}, "data.width", "is 65 tokens along this axis"),
    # Batches and schedule.
    ({"engine.micro_batch": 5}, "engine.global_batch", "nearest are 30 and 35"),
    ({"engine.sequence_parallel": 2}, "engine.sequence_parallel", "does not divide the number of processes, 1"),
    ({"optimizer.schedule": "constant"}, "optimizer.final_lr_share", "no effect"),
    # Stages.
    ({"objective.schedule": stage({"times.diffusion_share": 0.9})}, "objective.schedule.0", "add up to 1.15"),
    ({"objective.schedule": stage({"objective.epsilon": 0.5})}, "objective.schedule.0", "less than or equal to 0.1"),
    (
        {"objective.schedule": stage({"objective.epsilom": 0.01})},
        "objective.schedule.0",
        "objective.epsilom: unknown key with kind=flow_map; nearest is 'epsilon'",
    ),
    ({"objective.schedule": stage({"objective.kind": "x"})}, "objective.schedule.0", "the same in all stages"),
    ({"objective.schedule": stage({"optimizer.lr": 1.0})}, "objective.schedule.0", "a stage changes keys of objective"),
    (
        {"objective.schedule": stage({"objective.derivative_network": "student"})},
        "objective.schedule.0",
        "cannot change the weights (student)",
    ),
    ({"objective.schedule": [{"steps": 0, "changes": {}}]}, "objective.schedule.0.steps", "greater than 0"),
    # Validation.
    ({"evaluation.best_metric": "energy_distance_3"}, "evaluation.best_metric", "nearest is 'energy_distance_"),
    ({"evaluation.best_metric": "energy_4"}, "evaluation.best_metric", "nearest is 'energy_distance_4'"),
    (
        TAUGHT | {"evaluation.best_metric": "sliced_wasserstein_4"},
        "evaluation.best_metric",
        "(metrics energy_distance, rms, class_error",
    ),
    (TAUGHT | {"evaluation.samples": 1}, "evaluation.samples", "needs 2 or more"),
    (
        TAUGHT | {"teacher.source": None, "teacher.codec": "x"},
        "teacher.source",
        "set evaluation.reference=clips",
    ),
    ({"teacher.source": None, "evaluation.videos": 0}, "teacher.codec", "evaluation.oracle=none"),
    ({"teacher.source": None, "evaluation.oracle": "none"}, "teacher.codec", "evaluation.videos=0"),
]


@pytest.mark.parametrize(("changes", "key", "words"), CASES)
def test_run_rule(changes: dict[str, Any], key: str, words: str) -> None:
    errors = found(RunConfig, changed(changes), partial(run_errors, world=1))
    assert list(errors) == [key]
    assert words in errors[key]


SEQUENCE, GLOBAL_BATCH = "engine.sequence_parallel", "engine.global_batch"
POSSIBLE: list[dict[str, Any]] = [
    EIGHT_BITS,
    {"engine.fp8": "frozen", "engine.precision": "bf16", "objective.velocity": "teacher"},
    {"objective.guidance": "target", "objective.guidance_scale": 3.0},
    {"times.diffusion_share": 0.0, "objective.rebalance": "none"},
    {"times.diffusion_share": 0.5, "times.consistency_share": 0.5},
    {"objective.schedule": stage({"times.diffusion_share": 1.0, "times.consistency_share": 0.0})},
    {"student.init": None, "student.time_frequency_limit": 0.03},
    {"student.adapter": LORA | {"full_modules": ["time_embedder", "delta_embedder"]}},
    {"evaluation.best_metric": "sliced_wasserstein_8"},
    {"evaluation.every": 0, "evaluation.best_metric": "nothing", "teacher.source": None},
    {"evaluation.held_out": None, "evaluation.best_metric": "nothing"},
]


def test_a_sequence_is_split_by_heads_and_the_batch_by_groups() -> None:
    rule = partial(run_errors, world=6)
    alone = {"engine.global_batch": 32, "engine.micro_batch": 16}
    assert "attention heads, 4" in found(RunConfig, changed({**alone, "engine.sequence_parallel": 3}), rule)[SEQUENCE]
    assert "3 processes" in found(RunConfig, changed({**alone, "engine.sequence_parallel": 2}), rule)[GLOBAL_BATCH]
    assert (
        found(
            RunConfig, changed({"engine.micro_batch": 16, "engine.sequence_parallel": 2}), partial(run_errors, world=4)
        )
        == {}
    )


@pytest.mark.parametrize("changes", POSSIBLE)
def test_possible_runs(changes: dict[str, Any]) -> None:
    assert found(RunConfig, changed(changes), partial(run_errors, world=1)) == {}


WARNINGS: list[tuple[str, dict[str, Any], int, str, str]] = [
    (
        "tiny",
        {"optimizer.ema.start_step": 800},
        1,
        "optimizer.ema.start_step",
        "the average stays equal to the weights",
    ),
    ("tiny", {"optimizer.warmup_steps": 800}, 1, "optimizer.warmup_steps", "never reached"),
    ("tiny", {"evaluation.every": 801}, 1, "evaluation.every", "no validation"),
    (
        "tiny",
        {"objective.derivative_precision": "bf16", "engine.precision": "fp32"},
        1,
        "objective.derivative_precision",
        "less precise than the network",
    ),
    ("tiny", {"engine.precision": "bf16"}, 1, "objective.derivative_precision", "many times slower on a GPU"),
    ("tiny", {"objective": WHOLE}, 1, "times.diffusion_share", "choose times=flow_matching"),
    ("tiny", {"objective.schedule": [{"steps": 800, "changes": {}}]}, 1, "objective.schedule", "are never used"),
    ("tiny", {"objective.noise_share": 0.3}, 1, "objective.noise_share", "no effect with objective.source=data"),
    (
        "tiny",
        {"objective.rebalance": "none", "objective.rebalance_floor": 0.1},
        1,
        "objective.rebalance_floor",
        "no effect with objective.rebalance=none",
    ),
    (
        "tiny",
        {"objective.derivative": "jvp", "objective.epsilon": 0.02},
        1,
        "objective.epsilon",
        "0.02 has no effect with objective.derivative=jvp",
    ),
    (
        "tiny",
        {"evaluation.reference": "teacher", "evaluation.reference_calls": 4},
        1,
        "evaluation.reference_calls",
        "4 is below 8",
    ),
    (
        "tiny",
        {"objective.schedule": [{"steps": 10, "changes": {"objective.noise_share": 0.3}}]},
        1,
        "objective.noise_share",
        "0.3 has no effect with objective.source=data",
    ),
    ("tiny", {"evaluation.shift": 1.0}, 1, "evaluation.shift", "times.shift=5"),
    ("tiny", {"evaluation.held_out": None}, 1, "evaluation.held_out", "no best checkpoint"),
    (
        "tiny_on_policy",
        {"engine.fp8": "frozen", "engine.precision": "bf16", "objective.derivative_precision": "fp16"},
        1,
        "engine.fp8",
        "'none' is safer",
    ),
    (
        "tiny",
        EIGHT_BITS | {"engine.device": "cuda", "objective.derivative_precision": "fp16"},
        1,
        "engine.fp8",
        "set engine.compile=true",
    ),
    ("tiny_reference", {"evaluation.guidance_scale": 3.0}, 1, "evaluation.guidance_scale", "is trained with guidance"),
    # 3 processes x micro-batch 2, 18 slots of which 9 are diffusion: the second micro-step holds 3 of 6, one a process;
    # with 12 slots, 6 diffusion fill the first micro-step; with 24 slots of which .4 are diffusion (10) it is uneven.
    (
        "tiny",
        {"engine.global_batch": 24, "engine.micro_batch": 2, "times.diffusion_share": 0.4},
        3,
        "engine.global_batch",
        "1 times more often than needed in each step; engine.global_batch=",
    ),
]


@pytest.mark.parametrize(("experiment", "changes", "world", "key", "words"), WARNINGS)
def test_warning(experiment: str, changes: dict[str, Any], world: int, key: str, words: str) -> None:
    values = changed(changes, experiment)
    assert found(RunConfig, values, partial(run_errors, world=world)) == {}
    config = RunConfig.model_validate_json(json.dumps(values))
    warnings = {finding.keys[0]: finding.text for finding in run_warnings(config, world)}
    assert list(warnings) == [key]
    assert words in warnings[key]


def test_a_key_that_a_stage_uses_has_an_effect() -> None:
    stage = {"steps": 10, "changes": {"objective.source": "student", "objective.velocity": "teacher"}}
    changes = {"objective.noise_share": 0.3, "objective.schedule": [stage]}
    config = RunConfig.model_validate_json(json.dumps(changed(changes)))
    assert run_warnings(config, 1) == []


def test_even_splits_do_not_warn() -> None:
    config = RunConfig.model_validate_json(json.dumps(changed({"engine.global_batch": 24, "engine.micro_batch": 2})))
    assert run_warnings(config, 3) == []


COMMAND_CASES: list[tuple[type[Model], Callable[[Any], Iterable[Finding]], dict[str, Any], str, str]] = [
    (PrepareConfig, commands.prepare, {"out": "x", "codec": "c"}, "source", "prompts=FILE"),
    (
        PrepareConfig,
        commands.prepare,
        {"out": "x", "codec": "c", "source": "s", "prompts": "p"},
        "prompts",
        "give only one",
    ),
    (PrepareConfig, commands.prepare, {"out": "x", "codec": "c", "source": "s", "frames": 80}, "frames", "77 and 81"),
    (PrepareConfig, commands.prepare, {"out": "x", "codec": "c", "source": "s", "height": 100}, "height", "96 and 112"),
    (SampleConfig, commands.sample, {"out": "x", "model": "m"}, "prompt", "prompts=FILE"),
    (SampleConfig, commands.sample, {"out": "x", "model": "m", "prompts": ["a"], "width": 100}, "width", "96 and 112"),
    (SampleConfig, commands.sample, {"out": "x", "model": "m", "prompts": ["a"], "frames": 2}, "frames", "1 and 5"),
    (
        EvaluateConfig,
        commands.evaluate,
        {"out": "x", "models": ["m"], "teacher": "t", "held_out": "h", "reference": "guided_teacher"},
        "guidance_scale",
        "above 1",
    ),
    (
        EvaluateConfig,
        commands.evaluate,
        {"out": "x", "models": ["m"], "teacher": "t", "held_out": "h", "guidance_scale": 3.0},
        "reference",
        "guided_teacher",
    ),
    (
        EvaluateConfig,
        commands.evaluate,
        {"out": "x", "models": ["m"], "teacher": "t", "held_out": "h", "training_shards": "h"},
        "training_shards",
        "is also held_out",
    ),
]


@pytest.mark.parametrize(("model", "rules", "values", "key", "words"), COMMAND_CASES)
def test_command_rule(
    model: type[Model], rules: Callable[[Any], Iterable[Finding]], values: dict[str, Any], key: str, words: str
) -> None:
    errors = found(model, values, rules)
    assert list(errors) == [key]
    assert words in errors[key]
