"""Memory, planned from shapes, against real training steps on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from anyflow_train.config.compose import compose
from anyflow_train.config.run import RunConfig
from anyflow_train.flow.draw import Draw
from anyflow_train.models.build import build_network
from anyflow_train.plan.fit import nearest_fit
from anyflow_train.plan.memory import CONTEXT, FRAGMENTATION, plan_memory
from anyflow_train.plan.networks import the_student
from anyflow_train.plan.states import BUCKET, Sizes
from tests.plan.steps import measured

# 4 layers of width 128 on 5 x 8 x 12 tokens: activations take as much as all state, and a step part of a second. Texts
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
    "student.init=null",
    "teacher.source=null",
    "teacher.codec=none",
    "objective.velocity=data",
    "data.frames=17",
    "data.height=128",
    "data.width=192",
    "data.text_lengths=[48]",
    "engine=cpu",
    "engine.global_batch=4",
    "engine.micro_batch=1",
    "evaluation=none",
]
# Where activations are to be little beside the weights.
SHORT = ["data.frames=5", "data.height=64", "data.width=64", "student.architecture.num_layers=2"]
LORA = ["student/adapter=lora", "student.adapter.rank=16"]
CAUSAL_LORA = ["student/adapter=lora_causal", "student.adapter.rank=16"]
FULL = ["student/adapter=full"]


def small(*overrides: str) -> RunConfig:
    return compose("train", ["experiment=wan1_3b_forward", *SMALL, *overrides], None, 1)


def on_policy(teacher: Path, *overrides: str) -> RunConfig:
    given = [*SMALL, f"teacher.source={teacher}", f"student.init={teacher}", "on_policy.steps=[50]", *overrides]
    return compose("train", ["experiment=wan1_3b_on_policy", *given], None, 1)


def in_chunks(experiment: str, *overrides: str) -> RunConfig:
    """A micro-batch of clips of nine chunks of 6 x 8 tokens, of which only the first is ever compressed."""
    chunks = "student.architecture.causal={chunk_partition: [1, 1, 1, 1, 1, 1, 1, 1, 1], full_chunk_limit: 8}"
    size = ["data.frames=33", "data.height=96", "data.width=128", "engine.micro_batch=4"]
    return compose("train", [f"experiment={experiment}", *SMALL, chunks, *size, *overrides], None, 1)


@pytest.mark.parametrize("checkpointing", ["none", "block", "selective"])
@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_planned_memory_is_what_a_step_takes(adapter: list[str], checkpointing: str) -> None:
    """Within 15 %, of all tensors together: state, gradients, activations, batch."""
    config = small(*adapter, "student.init=somewhere", f"student.gradient_checkpointing={checkpointing}")
    assert plan_memory(config, "ddp", 1).tensors == pytest.approx(measured(config, longest_rollout()), rel=0.15)


def test_planned_memory_in_8_bits() -> None:
    """Within 15 %: a graph keeps no copy of a weight that multiplies in fp8."""
    given = [*LORA, "student.init=somewhere", "engine.precision=bf16", "engine.fp8=frozen", *SHORT]
    config = small(*given, "student.gradient_checkpointing=false")
    assert plan_memory(config, "ddp", 1).tensors == pytest.approx(measured(config, longest_rollout()), rel=0.15)


@pytest.mark.parametrize(
    ("adapter", "overrides"),
    [
        (FULL, ["student.gradient_checkpointing=block"]),
        (FULL, ["student.gradient_checkpointing=none", "on_policy.first_jump=detached"]),
        (LORA, ["student.gradient_checkpointing=block"]),
    ],
    ids=["full", "full, no checkpointing, detached", "lora"],
)
def test_planned_memory_of_stage_2(adapter: list[str], overrides: list[str], tmp_path: Path) -> None:
    """Within 15 %, of student, fake score and teacher, in a step with the longest rollout."""
    build_network(ARCHITECTURE, 0).save_pretrained(tmp_path)
    config = on_policy(tmp_path, *adapter, *overrides)
    assert plan_memory(config, "ddp", 1).tensors == pytest.approx(measured(config, longest_rollout()), rel=0.15)


@pytest.mark.parametrize("adapter", [FULL, CAUSAL_LORA], ids=["full", "lora"])
def test_planned_memory_of_sequences(adapter: list[str]) -> None:
    """Within 10 %, so that the keys and values that are copied for rectangles of attention have to be counted."""
    given = [*adapter, "student.init=somewhere", "student.gradient_checkpointing=none", "context.long_share=1"]
    config = in_chunks("wan1_3b_causal", *given)
    assert plan_memory(config, "ddp", 1).tensors == pytest.approx(measured(config, 0), rel=0.1)


def test_planned_memory_of_rollouts_by_chunk(tmp_path: Path) -> None:
    """Within 10 %: gradient checkpointing keeps the keys and values of the past of every chunk."""
    build_network(ARCHITECTURE, 0).save_pretrained(tmp_path)
    given = [f"teacher.source={tmp_path}", f"student.init={tmp_path}", "student.gradient_checkpointing=block"]
    given += ["on_policy.steps=[2]", "on_policy.objective_weight=0", *CAUSAL_LORA]
    config = in_chunks("wan1_3b_causal_on_policy", *given)
    assert plan_memory(config, "ddp", 1).tensors == pytest.approx(measured(config, 0), rel=0.1)


def test_parts_add_up() -> None:
    memory = plan_memory(small(*FULL), "zero2", 4)
    assert sum(size for _, size in memory.parts) == memory.total
    assert memory.total == pytest.approx(memory.tensors * (1 + FRAGMENTATION) + CONTEXT, abs=1)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        # trained weights, masters, moments, averages: in numbers of 4 bytes for each parameter, on 4 processes
        ("ddp", (1, 0, 2, 1)),
        ("zero1", (1, 1 / 4, 2 / 4, 1)),
        ("zero2", (1, 1 / 4, 2 / 4, 1)),
        ("zero3", (1 / 4, 0, 2 / 4, 1 / 4)),
    ],
)
def test_what_an_engine_cuts(engine: str, expected: tuple[float, ...]) -> None:
    config = small(*FULL)
    parts = dict(plan_memory(config, engine, 4).state)
    names = (
        "weights, trained (float32)",
        "masters (float32)",
        "Adam's moments (float32)",
        "averages (EMA, float32)",
    )
    whole = 4 * Sizes.of(the_student(config)).base
    assert [parts[name] for name in names] == pytest.approx([share * whole for share in expected], abs=32)


@pytest.mark.parametrize(("engine", "share"), [("ddp", 1), ("zero2", 1), ("zero3", 1 / 4)])
def test_frozen_weights_are_cut_at_stage_3_only(engine: str, share: float) -> None:
    config = small(*LORA, "student.init=somewhere")
    sizes = Sizes.of(the_student(config))
    frozen = dict(plan_memory(config, engine, 4).state)["weights, frozen (float32)"]
    assert frozen == pytest.approx(4 * share * (sizes.whole - sizes.trained), abs=4)


def test_an_engine_that_cuts_less_is_never_advised() -> None:
    """A small network takes more room under ZeRO-3, for its bucket; yet who asks for that has a reason."""
    config, limit = small(*FULL), CONTEXT + BUCKET // 2
    assert plan_memory(config, "ddp", 4).total < limit < plan_memory(config, "zero3", 4).total
    assert nearest_fit(config, None, "zero3", 4, limit) is None


def test_offload_leaves_activations_and_buffers() -> None:
    memory = plan_memory(small(*FULL), "zero3_offload", 4)
    assert memory.state == ()
    assert memory.moment.buffers >= BUCKET
    assert memory.host > plan_memory(small(*FULL), "zero3", 4).total - memory.total


def test_a_teacher_is_held_too() -> None:
    given = ["experiment=wan1_3b_forward"]
    own = compose("train", [*given, "student/adapter=full"], None, 8)
    name = "teacher: weights, frozen (float32)"
    assert dict(plan_memory(own, "ddp", 8).state)[name] == 4 * Sizes.of(the_student(own)).base
    # Adapters on the teacher itself.
    assert dict(plan_memory(compose("train", given, None, 8), "ddp", 8).state)[name] == 0


def test_a_teacher_in_8_bits_takes_a_quarter() -> None:
    """What is no matrix of a block stays float32: embeddings, norms, the way out."""
    given = ["student/adapter=full", "engine.fp8=frozen"]
    config = compose("train", ["experiment=wan1_3b_forward", *given], None, 8)
    sizes, parts = Sizes.of(the_student(config)), dict(plan_memory(config, "ddp", 8).state)
    assert parts["teacher: weights, frozen (fp8)"] == sizes.matrices
    assert parts["teacher: weights, frozen (float32)"] == 4 * (sizes.base - sizes.matrices) < sizes.matrices


def test_the_sequence_is_split() -> None:
    whole, halved = (
        plan_memory(
            compose("train", ["experiment=wan1_3b_forward", f"engine.sequence_parallel={k}"], None, 8), "ddp", 8
        )
        for k in (1, 2)
    )
    assert 0.5 < halved.moment.activations / whole.moment.activations < 0.6


def longest_rollout() -> int:
    """The first step in which a rollout through a sampler of 50 steps makes three jumps."""
    draws = (Draw(0, step, (0,), torch.device("cpu")).scoped("distribution matching") for step in range(20))
    return next(draw.step for draw in draws if 0 < int(50 * draw.shared("steps", 2)[1]) < 49)
