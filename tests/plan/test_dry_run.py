"""A dry run against real steps: torch's own counter of operations, and a counter of the memory that is alive."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_train.config.compose import compose
from anyflow_train.config.run import RunConfig
from anyflow_train.models.wan import build_network
from anyflow_train.plan.dry_run import DryRun, dry_run
from anyflow_train.plan.memory import plan_memory
from tests.plan.steps import counted, measured

# 4 blocks of width 128 on 5 x 8 x 12 tokens: activations take as much as all state, and a step part of a second. Texts
# are longer than the 32 tokens up to which a CPU keeps the attention scores, which no GPU does.
ARCHITECTURE = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "text_dim": 64,
    "freq_dim": 64,
    "ffn_dim": 512,
    "num_layers": 4,
}
SMALL = [f"student.architecture.{key}={value}" for key, value in ARCHITECTURE.items()] + [
    "teacher.codec=none",
    "data.frames=17",
    "data.height=128",
    "data.width=192",
    "data.text_lengths=[48]",
    "objective.text_dropout=0",
    "objective.derivative_precision=fp32",
    "engine=cpu",
    "engine.global_batch=4",
    "engine.micro_batch=1",
    "evaluation=none",
]
LORA = ["student/adapter=lora", "student.adapter.rank=16"]
FULL = ["student/adapter=full"]
CAUSAL = "student.architecture.causal={chunk_partition: [1, 2, 2], full_chunk_limit: 2}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("network")
    build_network(ARCHITECTURE, 0).save_pretrained(place)
    return place


@pytest.fixture
def small(folder: Path) -> Callable[..., RunConfig]:
    def config(experiment: str, *overrides: str) -> RunConfig:
        given = [f"experiment={experiment}", *SMALL, f"teacher.source={folder}", f"student.init={folder}"]
        return compose("train", [*given, *overrides], None, 1)

    return config


def on_cpu(config: RunConfig) -> DryRun:
    return dry_run(config, 1, nullcontext)


CASES: dict[str, list[str]] = {
    "full": ["wan1_3b_forward", *FULL, "student.gradient_checkpointing=none"],
    "full, block": ["wan1_3b_forward", *FULL, "student.gradient_checkpointing=block"],
    "lora": ["wan1_3b_forward", *LORA, "student.gradient_checkpointing=none"],
    "lora, block": ["wan1_3b_forward", *LORA, "student.gradient_checkpointing=block"],
    "lora, selective": ["wan1_3b_forward", *LORA, "student.gradient_checkpointing=selective"],
    "stage 2, full": ["wan1_3b_on_policy", *FULL, "on_policy.steps=[2]"],
    "stage 2, lora": ["wan1_3b_on_policy", *LORA, "on_policy.steps=[2]"],
    "causal": ["wan1_3b_causal", *FULL, CAUSAL, "context.long_share=1", "context.bidirectional_probability=0"],
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_a_step_takes(case: str, small: Callable[..., RunConfig]) -> None:
    """Within 2 %, of all tensors together: state, gradients, activations, batches. The rest is what single operations
    allocate for themselves, which only the allocator sees."""
    config = small(*CASES[case])
    planned = plan_memory(config, on_cpu(config), "ddp", 1).tensors
    assert planned == pytest.approx(measured(config, 0), rel=0.02)


@pytest.mark.parametrize("case", CASES)
def test_operations_are_what_torch_counts(case: str, small: Callable[..., RunConfig]) -> None:
    config = small(*CASES[case])
    assert sum(on_cpu(config).operations.values()) == pytest.approx(counted(config, (0,)), rel=1e-9)
