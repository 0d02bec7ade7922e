"""Memory, planned from shapes, against real training steps on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from anyflow_train.config.compose import compose
from anyflow_train.config.run import RunConfig
from anyflow_train.config.slots import micro_slots
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.wan import build_network
from anyflow_train.plan.fit import nearest_fit
from anyflow_train.plan.memory import CONTEXT, FRAGMENTATION, plan_memory
from anyflow_train.plan.networks import the_student
from anyflow_train.plan.states import BUCKET, Sizes
from anyflow_train.training.recipe import build_recipe
from anyflow_train.training.updates import make_update
from anyflow_train.training.world import ALONE

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
    "data.frames=17",
    "data.height=128",
    "data.width=192",
    "data.text_lengths=[48]",
    "engine=cpu",
    "engine.global_batch=4",
    "engine.micro_batch=1",
    "evaluation=none",
]
LORA = ["student/adapter=lora", "student.adapter.rank=16"]
FULL = ["student/adapter=full"]


def small(*overrides: str) -> RunConfig:
    return compose("train", ["experiment=wan1_3b_forward", *SMALL, *overrides], None, 1)


def on_policy(teacher: Path, *overrides: str) -> RunConfig:
    given = [*SMALL, f"teacher.source={teacher}", f"student.init={teacher}", "on_policy.steps=[50]", *overrides]
    return compose("train", ["experiment=wan1_3b_on_policy", *given], None, 1)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("adapter", [FULL, LORA], ids=["full", "lora"])
def test_planned_memory_is_what_a_step_takes(adapter: list[str], checkpointing: str) -> None:
    """Within 15 %, of all tensors together: state, gradients, activations, batch."""
    config = small(*adapter, "student.init=somewhere", f"student.gradient_checkpointing={checkpointing}")
    assert plan_memory(config, "ddp", 1).tensors == pytest.approx(measured(config), rel=0.15)


@pytest.mark.parametrize(
    ("adapter", "overrides"),
    [
        (FULL, ["student.gradient_checkpointing=true"]),
        (FULL, ["student.gradient_checkpointing=false", "on_policy.first_jump=detached"]),
        (LORA, ["student.gradient_checkpointing=true"]),
    ],
    ids=["full", "full, no checkpointing, detached", "lora"],
)
def test_planned_memory_of_stage_2(adapter: list[str], overrides: list[str], tmp_path: Path) -> None:
    """Within 15 %, of student, fake score and teacher, in a step with the longest rollout."""
    build_network(ARCHITECTURE, 0).save_pretrained(tmp_path)
    config = on_policy(tmp_path, *adapter, *overrides)
    assert plan_memory(config, "ddp", 1).tensors == pytest.approx(measured(config), rel=0.15)


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
    config = compose("train", ["experiment=wan1_3b_forward", "objective.velocity=teacher"], None, 8)
    assert (
        dict(plan_memory(config, "ddp", 8).state)["teacher: weights, frozen (float32)"]
        == 4 * Sizes.of(the_student(config)).base
    )


def test_the_sequence_is_split() -> None:
    whole, halved = (
        plan_memory(
            compose("train", ["experiment=wan1_3b_forward", f"engine.sequence_parallel={k}"], None, 8), "ddp", 8
        )
        for k in (1, 2)
    )
    assert 0.5 < halved.moment.activations / whole.moment.activations < 0.6


def measured(config: RunConfig) -> int:
    """Bytes of tensors at the fullest moment of a step.

    What is there before it: parameters, moments, averages and a step's batches, added up. What it adds: the highest sum
    of the allocations less the frees that torch's profiler saw in the allocator, temporary buffers inside of operations
    included. Nothing of the process's resident set.
    """
    buildable = config
    if config.student.init == "somewhere":  # adapters on random weights: no run may have them, their sizes are the same
        student = config.student.model_copy(update={"init": None})
        buildable = config.model_copy(update={"student": student})
    recipe = build_recipe(buildable, ALONE)
    batches, draws = step_of(config)
    before = [tensor for batch in batches for tensor in (batch.latents, batch.condition.text, batch.negative.text)]
    moments = 0
    for trainable in recipe.trainables.values():
        before += trainable.network.parameters()
        before += [average for _, average in trainable.ema.tensors()] if trainable.ema else []
        moments += 2 * sum(shard.nbytes for shard in trainable.engine.shards().values())
    if isinstance(recipe.roles.teacher, NetworkFlowMap):
        before += recipe.roles.teacher.network.parameters()

    def step() -> None:
        for update in recipe.updates:
            make_update(update, recipe.trainables[update.role], recipe.roles, batches, draws, 1e-4, "")

    held = {id(tensor): tensor.nbytes for tensor in before}  # roles on one base hold it once
    return sum(held.values()) + moments + peak_bytes(step)


def peak_bytes(call: Callable[[], None]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def step_of(config: RunConfig) -> tuple[list[Batch], list[Draw]]:
    frames, height, width = (config.data.frames - 1) // 4 + 1, config.data.height // 8, config.data.width // 8
    slots = micro_slots(config.engine.global_batch, config.engine.micro_batch, 1, 0)

    def text(rows: int) -> Condition:
        return Condition(torch.randn(rows, max(config.data.text_lengths), config.student.architecture.text_dim))

    def latents(rows: int) -> Tensor:
        return torch.randn(rows, frames, config.student.architecture.in_channels, height, width)

    batches = [Batch(latents(len(own)), text(len(own)), text(1), ("",) * len(own), own) for own in slots]
    return batches, [Draw(0, longest_rollout(), own, torch.device("cpu")) for own in slots]


def longest_rollout() -> int:
    """The first step in which a rollout through a sampler of 50 steps makes three jumps."""
    draws = (Draw(0, step, (0,), torch.device("cpu")).scoped("distribution matching") for step in range(20))
    return next(draw.step for draw in draws if 0 < int(50 * draw.shared("steps", 2)[1]) < 49)
