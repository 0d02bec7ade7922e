"""Runs on the pretended GPU: devices, dtypes, launches and memory. Numbers mean nothing there."""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow_train.bench.command import PARTS, launcher_of_one_process
from anyflow_train.bench.steps import random_batches, random_materials
from anyflow_train.config.compose import compose
from anyflow_train.config.network import Lora
from anyflow_train.config.run import RunConfig
from anyflow_train.flow.draw import Draw
from anyflow_train.models.adapters import add_lora
from anyflow_train.models.frozen import store_in_bfloat16
from anyflow_train.models.recompute import RECOMPUTE
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from anyflow_train.plan.dry_run import VARIANTS, dry_run
from anyflow_train.plan.memory import plan_memory
from anyflow_train.plan.stand_ins import DryDraw
from anyflow_train.text import GIB
from anyflow_train.training.checkpoints.saving import Saver
from anyflow_train.training.checkpoints.state import TrainState
from anyflow_train.training.checkpoints.tensor_handle import Entry
from anyflow_train.training.processes.world import World, start_world
from anyflow_train.training.recipe import build_recipe
from anyflow_train.training.updates import make_update
from tests.pretended_gpu.counter import counted, total
from tests.training.helpers import settings, train, write_latents, write_networks

pytestmark = pytest.mark.pretended_gpu

SHAPE = {"num_attention_heads": 4, "attention_head_dim": 128, "ffn_dim": 2048, "text_dim": 256}
LAYERS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")
TIMES = tuple(f"{kind}_embedder.linear_{n}" for kind in ("time", "delta") for n in (1, 2))
# Launches of a block with the published adapters: forward, backward, and backward with recomputation. Before kernels
# were fused, frozen weights stored in bfloat16 and products added in place, they were 107, 122 and 227.
MOST = (49, 67, 116)


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


# Of the 1.3B model at 81 frames of 480x832, one sample per micro-batch.
TWO, ALL = "student.architecture.num_layers=2", "student.architecture.num_layers=30"
FORWARD = ("experiment=wan1_3b_forward", "objective=flow_map")
STEP = (
    *("evaluation=none", "data.shards=none", "teacher.codec=none"),
    *("engine.global_batch=4", "engine.micro_batch=1", "student.init=random-weights", "teacher.source=random-weights"),
)
CHECKPOINTED = "student.gradient_checkpointing="
STAGE_2 = ("experiment=wan1_3b_on_policy", "objective=flow_map", "on_policy.fake_score.init=random-weights")
MEMORY = {
    "LoRA, selective, 2 blocks": (*FORWARD, TWO, CHECKPOINTED + "selective"),
    "LoRA, block, 2 blocks": (*FORWARD, TWO, CHECKPOINTED + "block"),
    "LoRA, selective, 30 blocks": (*FORWARD, ALL, CHECKPOINTED + "selective"),
    "full, selective, 2 blocks": (*FORWARD, TWO, "student/adapter=full", CHECKPOINTED + "selective"),
    "full, block, 30 blocks": (*FORWARD, ALL, "student/adapter=full", CHECKPOINTED + "block"),
    "stage 2 on one base, 30 blocks": (*STAGE_2, ALL, "on_policy.calls=[2]"),
    "causal, 2 blocks": ("experiment=wan1_3b_causal", TWO, "context.bidirectional_probability=0"),
    "zero3, LoRA, 2 blocks": (*FORWARD, TWO, CHECKPOINTED + "selective"),
}


@pytest.mark.parametrize("case", MEMORY)
def test_memory_is_what_the_plan_says(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 5 %: torch's allocator against the dry run."""
    strategy = "zero3" if case.startswith("zero3") else "ddp"
    if strategy == "zero3":
        pretend_zero3(monkeypatch)
    config = compose("train", [*MEMORY[case], *STEP], None, 1)
    found = dry_run(config, 1)
    planned, measured = plan_memory(config, found, strategy, 1).tensors, peak(config, found.costliest)
    print(f"{case}: {planned / GIB:.2f} GiB planned, {measured / GIB:.2f} measured, {planned / measured:.3f}")
    assert planned == pytest.approx(measured, rel=0.05)


def pretend_zero3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the only process of a launcher, and leave out what DeepSpeed decides by numbers from the GPU."""
    for name, value in launcher_of_one_process(PARTS["zero3"]).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.delenv("FAKEGPU_FILL")  # it prints parameters, and would take a filled count for billions of numbers
    for module in ("partition_parameters", "partitioned_param_coordinator"):
        monkeypatch.setattr(f"deepspeed.runtime.zero.{module}.assert_ints_same_as_other_ranks", lambda ints: None)


def peak(config: RunConfig, variant: int) -> int:
    """Bytes of torch's allocator at the fullest moment of a step with the shared numbers of a draw of the plan."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    world = start_world(config.engine)
    recipe = build_recipe(config, world, random_materials(config, world.device))
    batches = random_batches(config, 0, world.device)
    draws = [SharedDraw(0, 0, batch.positions, world.device, variant=variant) for batch in batches]
    torch.cuda.reset_peak_memory_stats()
    for update in recipe.updates:
        make_update(update, recipe.trainables[update.role], recipe.roles, batches, draws, 1e-4, "")
    return torch.cuda.max_memory_allocated() - before


@dataclass(frozen=True)
class SharedDraw(Draw):
    """Shared numbers are those of a dry run's draw."""

    variant: int = 0

    def shared(self, purpose: str, columns: int) -> list[float]:
        return DryDraw(0, 0, self.positions, self.device, variant=self.variant, variants=VARIANTS).shared(
            purpose, columns
        )
