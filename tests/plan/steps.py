"""Real steps on a CPU, counted and measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from anyflow_train.config.derived import latent_shape
from anyflow_train.config.positions import local_positions
from anyflow_train.config.run import RunConfig
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.training.processes.world import ALONE
from anyflow_train.training.recipe import build_recipe
from anyflow_train.training.updates import make_update

ATEN = torch.ops.aten
# Torch's counter lacks the kernels of a CPU, which compute what those of a GPU do, and products added in place.
ON_CPU: dict[Any, Any] = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
    ATEN.addmm_: lambda _, first, second, **__: 2 * first[0] * first[1] * second[1],
}


def counted(config: RunConfig, steps: Sequence[int]) -> int:
    """Operations of real steps: everybody's updates, as their turns come."""
    recipe = build_recipe(config, ALONE)
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        for step in steps:
            batches, draws = step_of(config, step)
            for update in recipe.updates:
                if step % update.every == 0:
                    make_update(update, recipe.trainables[update.role], recipe.roles, batches, draws, 1e-4, "")
    return counter.get_total_flops()


def measured(config: RunConfig, step: int) -> int:
    """Bytes of tensors at the fullest moment of a step.

    What is there before it: parameters, moments, averages and a step's batches, added up. What it adds: the highest sum
    of the allocations less the frees that torch's profiler saw in the allocator, temporary buffers inside of operations
    included. Nothing of the process's resident set.
    """
    recipe = build_recipe(config, ALONE)
    batches, draws = step_of(config, step)
    before = [tensor for batch in batches for tensor in (batch.latents, batch.condition.text, batch.negative.text)]
    moments = 0
    for trainable in recipe.trainables.values():
        before += trainable.network.parameters()
        before += [average for _, average in trainable.ema.tensors()] if trainable.ema else []
        moments += 2 * sum(shard.nbytes for shard in trainable.engine.shards().values())
    if isinstance(recipe.roles.teacher, NetworkFlowMap):
        before += recipe.roles.teacher.network.parameters()

    def make() -> None:
        for update in recipe.updates:
            make_update(update, recipe.trainables[update.role], recipe.roles, batches, draws, 1e-4, "")

    held = {id(tensor): tensor.nbytes for tensor in before}  # roles on one base hold it once
    return sum(held.values()) + moments + peak_bytes(make)


def peak_bytes(call: Callable[[], None]) -> int:
    gc.collect()  # what an earlier profile saw allocated must not be freed in this one
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    inner: Any = profiler.profiler
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest


def step_of(config: RunConfig, step: int) -> tuple[list[Batch], list[Draw]]:
    """Random data of a step's micro-batches, with the longest text, and their random numbers."""
    latent = latent_shape(config.data, config.student.architecture.in_channels)
    positions = local_positions(config.engine.global_batch, config.engine.micro_batch, 1, 0)

    def text(rows: int) -> Condition:
        return Condition(torch.randn(rows, max(config.data.text_lengths), config.student.architecture.text_dim))

    batches = [
        Batch(torch.randn(len(own), *latent), text(len(own)), text(1), ("",) * len(own), own) for own in positions
    ]
    return batches, [Draw(config.seed, step, own, torch.device("cpu")) for own in positions]
