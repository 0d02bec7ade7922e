"""Runs on the pretended GPU: devices, dtypes, launches and memory. Numbers mean nothing there."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow_train.config.compose import compose
from anyflow_train.config.network import Lora
from anyflow_train.config.run import RunConfig
from anyflow_train.models.adapters import add_lora
from anyflow_train.models.build import build_network
from anyflow_train.models.frozen import store_in_bfloat16
from anyflow_train.models.recompute import RECOMPUTE
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from anyflow_train.plan.dry_run import dry_run_memory
from anyflow_train.plan.memory import plan_memory
from anyflow_train.training.checkpoints.saving import Saver
from anyflow_train.training.checkpoints.state import TrainState
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.processes.world import World
from anyflow_train.training.recipe import build_recipe
from anyflow_train.training.updates import make_update
from tests.plan.steps import step_of
from tests.pretended_gpu.counter import counted, total
from tests.training.helpers import settings, train, write_latents, write_networks

pytestmark = pytest.mark.pretended_gpu

SHAPE = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 2048, "text_dim": 256}
LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")
TIMES = tuple(f"{kind}_embedder.linear_{n}" for kind in ("time", "delta") for n in (1, 2))
# Launches of a block with the published adapters: forward, backward, and backward with recomputation. Before kernels
# were fused, frozen weights stored in bfloat16 and products added in place, they were 107, 122 and 227.
MOST = (49, 76, 125)


@pytest.fixture(autouse=True)
def on_gpu() -> Any:
    """Only cuDNN's kernels are missing."""
    assert torch.cuda.is_available(), "run these tests as CONTRIBUTING.md says"
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


def launches(blocks: int, checkpointed: bool, folder: Path) -> list[Counter[str]]:
    """Launches of a forward and of a backward of adapters on a frozen network."""
    with torch.device("cuda"):
        network = store_in_bfloat16(AnyFlowTransformer3DModel(**SHAPE, num_layers=blocks))
        add_lora(network, Lora(kind="lora", rank=16, alpha=16.0, targets=(*LAYERS, *TIMES)), 0)
        x, t, text = torch.randn(1, 4, 16, 16, 16, requires_grad=True), torch.rand(1), torch.randn(1, 64, 256)
    if checkpointed:
        network.enable_gradient_checkpointing(RECOMPUTE["block"])
    network = torch.nn.Module.to(network, "cuda")
    made: list[torch.Tensor] = []

    def forward() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            made.append(network(x, t, t, text).sample)

    found = []
    for _ in range(2):  # the first step also compiles kernels and makes tables
        ahead = counted(forward, folder)
        loss = made.pop().square().mean()
        found = [ahead, counted(loss.backward, folder)]
        network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_block_launches_few_kernels(checkpointed: bool, tmp_path: Path) -> None:
    few, more = (launches(blocks, checkpointed, tmp_path) for blocks in (1, 2))
    forward, backward = (total(b) - total(a) for a, b in zip(few, more, strict=True))
    assert forward <= MOST[0]
    assert backward <= MOST[2 if checkpointed else 1]


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_trains_saves_and_resumes(kind: str, tmp_path: Path) -> None:
    """Every tensor is on the right device and of the right dtype, or torch raises an error."""
    write_latents(tmp_path / "shards")
    write_networks(tmp_path)
    config = settings(tmp_path, steps=2, engine__device="cuda", engine__precision="bf16", engine__attention="flash")
    config["student"] |= {"init": str(tmp_path / "network"), "time_frequency_limit": None}
    config["teacher"] = {"source": str(tmp_path / "teacher"), "codec": "none"}
    config["objective"] = {"kind": "flow_map", "velocity": "teacher", "derivative_precision": "fp16"}
    if kind == "lora":
        config["student"]["adapter"] = {"kind": "lora", "rank": 2, "alpha": 2.0, "full_modules": ["delta_embedder"]}
    train(config)
    assert (train(config | {"steps": 3}) / "done.json").is_file()


def test_a_save_synchronises_once_per_pinned_buffer(tmp_path: Path) -> None:
    """Tensor by tensor from pageable memory, there would be a synchronisation for each of the 300."""
    world = World(torch.device("cuda"))
    tensors = {f"weight {number}": torch.ones(1 << 10, 1 << 8, device="cuda") for number in range(300)}  # 1 MiB each
    config = RunConfig.model_validate(settings(tmp_path))
    with closing(Saver(config, tmp_path, world, lambda text: None)) as saver:

        def save() -> None:
            saver.save(TrainState(step=1), {"student": 1}, {"weights": {k: Entry.of(t) for k, t in tensors.items()}})

        found = counted(save, tmp_path)
        saver.wait()
    assert found["d2h"] == 300
    assert found["syncs"] == 5  # buffers of 64 MiB


@pytest.mark.parametrize("checkpointing", ["block", "selective"])
def test_memory_is_what_the_plan_says(checkpointing: str, tmp_path: Path) -> None:
    """Within 5 %: the allocator of torch against the dry run, for a step of adapters."""
    shape = {**SHAPE, "freq_dim": 64, "num_layers": 2}
    build_network(shape, 0).save_pretrained(tmp_path)
    words = [f"student.architecture.{key}={value}" for key, value in shape.items()]
    words += ["data.frames=17", "data.height=256", "data.width=256", "data.text_lengths=[48]", "teacher.codec=none"]
    words += [f"teacher.source={tmp_path}", f"student.init={tmp_path}", "objective=flow_map", "evaluation=none"]
    words += ["engine.global_batch=4", "engine.micro_batch=1", f"student.gradient_checkpointing={checkpointing}"]
    config = compose("train", ["experiment=wan1_3b_forward", *words], None, 1)
    planned = plan_memory(config, dry_run_memory(config, 1, 0), "ddp", 1).tensors
    assert planned == pytest.approx(peak(config), rel=0.05)


def peak(config: RunConfig) -> int:
    """Bytes of torch's allocator at the fullest moment of a step."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    recipe = build_recipe(config, World(torch.device("cuda")))
    batches, draws = step_of(config, 0)
    draws = [type(draw)(draw.seed, draw.step, draw.positions, torch.device("cuda")) for draw in draws]
    batches = [batch.to(torch.device("cuda")) for batch in batches]
    torch.cuda.reset_peak_memory_stats()
    for update in recipe.updates:
        make_update(update, recipe.trainables[update.role], recipe.roles, batches, draws, 1e-4, "")
    return torch.cuda.max_memory_allocated() - before
