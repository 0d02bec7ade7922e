"""Causal students: operations against torch's own count of the real network, memory against real steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.compose import compose
from anyflow_train.config.network import LORA_TARGETS, Architecture, Causal, FullTraining, Lora
from anyflow_train.config.rows import ChunkRows
from anyflow_train.config.run import RunConfig
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import CachedContext, Condition, TeacherForced
from anyflow_train.models.adapters import add_lora
from anyflow_train.models.build import build_network
from anyflow_train.models.far_transformer import AnyFlowFARTransformer3DModel
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.plan.products import forward_products
from anyflow_train.plan.work import step_parts
from tests.plan.steps import counted

SHAPE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}
WIDTH, TEXT = 24, 40
# Frames of 4 x 4 patches, or of 2 x 2 where they are compressed.
ROWS = ChunkRows(Chunks((1, 2, 2, 1), 2), 16, 4)
ARCHITECTURE = Architecture.model_validate(
    {**SHAPE, "causal": Causal(chunk_partition=ROWS.chunks.partition, full_chunk_limit=ROWS.chunks.full_limit)}
)
TIMES = tuple(f"{which}_embedder.linear_{number}" for which in ("time", "delta") for number in (1, 2))
# As shipped: adapters, and the patches of the context trained whole. Unfused attention then leaves out the gradients of
# text keys and values in both blocks: see `test_products`.
LORA = Lora(kind="lora", rank=4, targets=LORA_TARGETS + TIMES, full_modules=("far_patch_embedding",))
ADAPTERS = {"full": (FullTraining(), 0), "lora": (LORA, 4)}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_sequence_costs_what_torch_counts(name: str, count: int, checkpointing: bool, unfused: None) -> None:
    adapter, left_out = ADAPTERS[name]
    network = network_with(adapter)
    if checkpointing:
        network.enable_gradient_checkpointing()
    drawn = ROWS.chunks.sequence(count)
    past = TeacherForced(drawn.chunks, clips(drawn.context), clips(drawn.frames - drawn.context))
    forward, backward = passes(lambda: called(network, clips(drawn.frames - drawn.context), past))
    rows = ROWS.sequence(drawn)
    planned = forward_products(ARCHITECTURE, adapter, rows, TEXT)
    assert forward == planned.forward
    again = planned.recomputed("block" if checkpointing else "none")
    assert backward == planned.backward + again - left_out * 2 * rows.tokens * TEXT * WIDTH


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_chunk_of_a_rollout_costs_what_torch_counts(name: str, count: int, unfused: None) -> None:
    """Its past is encoded without gradient, and its own latents need one."""
    adapter, left_out = ADAPTERS[name]
    network = network_with(adapter)
    chunks = ROWS.chunks.partition[: count + 1]
    flow_map, memory = NetworkFlowMap(network, None), None
    if count:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            memory = flow_map.encode_context(clips(sum(chunks[:-1])), chunks[:-1], Condition(torch.randn(1, TEXT, 20)))
        assert counter.get_total_flops() == forward_products(ARCHITECTURE, adapter, ROWS.encoding(count), TEXT).forward
    latents = clips(chunks[-1]).requires_grad_()
    forward, backward = passes(lambda: called(network, latents, CachedContext(chunks, memory)))
    rows = ROWS.next_chunk(count)
    planned = forward_products(ARCHITECTURE, adapter, rows, TEXT, latents_need_gradient=True)
    assert forward == planned.forward
    assert backward == planned.backward - left_out * 2 * rows.tokens * TEXT * WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("networks")
    build_network(SHAPE, 0).save_pretrained(place)
    return place


def small(folder: Path, experiment: str, *overrides: str) -> RunConfig:
    """Every step trains on the one sequence that has a context, and its rollouts have two jumps, whatever is drawn; no
    text is dropped."""
    given = [f"student.architecture.{name}={value}" for name, value in SHAPE.items()]
    given += [f"student.init={folder}", f"teacher.source={folder}", "teacher.codec=none", "evaluation=none"]
    given += ["student.architecture.causal={chunk_partition: [1, 1, 2], full_chunk_limit: 2}", "data.frames=13"]
    given += ["data.height=64", "data.width=64", f"data.text_lengths=[{TEXT}]", "student/adapter=full", "steps=2"]
    given += ["student.gradient_checkpointing=block"]  # all of it: unfused attention is always done again
    given += ["engine=cpu", "engine.global_batch=4", "engine.micro_batch=2", "context.long_share=1"]
    given += ["objective.text_dropout=0", *overrides]
    return compose("train", [f"experiment={experiment}", *given], None, 1)


@pytest.mark.parametrize("probability", [0, 1])
def test_steps_of_stage_1_cost_what_torch_counts(folder: Path, probability: int, unfused: None) -> None:
    config = small(folder, "wan1_3b_causal", f"context.bidirectional_probability={probability}")
    planned = sum(part.flops for part in step_parts(config, 1))
    assert planned == pytest.approx(counted(config, (0,)), rel=1e-12)


def test_means_over_the_draws_cost_what_torch_counts(folder: Path, unfused: None) -> None:
    """Of two steps: one with each of the two sequences that are not compressed."""
    config = small(folder, "wan1_3b_causal", "context.long_share=0", "context.bidirectional_probability=0")
    steps = [next(step for step in range(20) if short(config, step) == count) for count in (1, 2)]
    planned = sum(part.flops for part in step_parts(config, 1))
    assert 2 * planned == pytest.approx(counted(config, steps), rel=1e-12)


def test_steps_of_stage_2_cost_what_torch_counts(folder: Path, unfused: None) -> None:
    """Of two steps: in the second the fake score rolls out for itself."""
    given = ["on_policy.steps=[2]", "on_policy.fake_score.updates=2", "context.bidirectional_probability=1"]
    config = small(folder, "wan1_3b_causal_on_policy", *given)
    planned = sum(part.flops for part in step_parts(config, 1))
    assert 2 * planned == pytest.approx(counted(config, (0, 1)), rel=1e-12)


def test_whole_clips_come_in_their_share_of_the_steps() -> None:
    parts = {part.name: part for part in step_parts(compose("train", ["experiment=wan1_3b_causal"], None, 8), 8)}
    whole = parts["flow matching on whole clips"]
    assert whole.share == parts["whole clips, recomputed"].share == 0.1
    assert all(part.share == 1 for part in parts.values() if "whole clips" not in part.name)


def short(config: RunConfig, step: int) -> int:
    return 1 + int(2 * Draw(config.seed, step, (0,), torch.device("cpu")).shared("chunks", 2)[1])


def network_with(adapter: FullTraining | Lora) -> AnyFlowFARTransformer3DModel:
    network = AnyFlowFARTransformer3DModel(**ARCHITECTURE.arguments())
    if isinstance(adapter, Lora):
        add_lora(network, adapter, 0)
    return network


def clips(frames: int) -> Tensor:
    return torch.randn(1, frames, 16, 8, 8)


def called(network: AnyFlowFARTransformer3DModel, x: Tensor, past: TeacherForced | CachedContext) -> Tensor:
    return NetworkFlowMap(network, None)(
        x, torch.rand(1), torch.zeros(1), Condition(torch.randn(1, TEXT, 20), past=past)
    )


def passes(call: Callable[[], Tensor]) -> tuple[int, int]:
    """Operations of a call and of its backward."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            out = call()
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()
