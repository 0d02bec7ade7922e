"""Measured steps of `anyflow bench`: ours, and those of the published way with diffusers' network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.transformers.transformer_anyflow import AnyFlowTransformer3DModel as StockTransformer
from torch import Tensor, nn

from anyflow_train.bench.notes import Notes
from anyflow_train.config.compose import compose
from anyflow_train.config.positions import local_positions
from anyflow_train.config.run import RunConfig
from anyflow_train.data.batch import Batch
from anyflow_train.devices import autocast_dtype
from anyflow_train.errors import UserError
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition
from anyflow_train.models.flow_map import TIME_SCALE
from anyflow_train.objectives.types import Roles
from anyflow_train.plan.dry_run import dry_run
from anyflow_train.plan.memory import plan_memory
from anyflow_train.plan.stand_ins import fake_batch, fake_source
from anyflow_train.text import GIB
from anyflow_train.training.attention import attention_by, choose_kernel
from anyflow_train.training.compilation import with_working_compiler
from anyflow_train.training.ema import Ema
from anyflow_train.training.engine import build_engine
from anyflow_train.training.gpus import TERA, known_gpu, utilisation
from anyflow_train.training.materials import Materials
from anyflow_train.training.processes.world import World, start_world
from anyflow_train.training.recipe import Recipe, build_recipe
from anyflow_train.training.updates import Trainable, make_update

MOST_STEPS = 3  # timed ones
STEP = (
    *("evaluation=none", "data.shards=none", "engine.global_batch=4"),
    *("student.init=random-weights", "teacher.source=random-weights", "teacher.codec=none"),
)
OURS = ("experiment=wan1_3b_forward", "objective=flow_map", *STEP)
PUBLISHED = ("experiment=wan1_3b_forward_reference", "student/adapter=full", "engine.micro_batch=1", *STEP)
# The published way computes the derivative also for samples with r = t, and multiplies it by zero.
EVERYWHERE = ("times.diffusion_share=0", "objective.rebalance=none", "student.gradient_checkpointing=block")
SMALL = (
    *("data.frames=9", "data.height=64", "data.width=64", "data.text_lengths=[16]"),
    *("student.architecture.num_layers=2", "student.architecture.num_attention_heads=2"),
    *("student.architecture.ffn_dim=256", "student.architecture.text_dim=64"),
)


def machine(notes: Notes, rehearse: bool, settings: list[str]) -> None:
    """Name the device, and measure matrix products and copies on it: what a step can reach at most."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    name = torch.cuda.get_device_name(device) if gpu else "CPU"
    notes.add(device=name, torch=torch.__version__)
    if gpu:
        notes.add(memory=f"{torch.cuda.mem_get_info(device)[0] / GIB:.1f} GiB free")
    side, numbers = (512, 1 << 20) if rehearse else (8192, 1 << 30)
    for dtype in (torch.bfloat16, torch.float32):
        left, right = torch.randn(2, side, side, device=device).to(dtype)
        rate = 2 * side**3 / seconds_of(partial(torch.matmul, left, right)) / TERA
        notes.add(**{f"matrix products in {str(dtype).partition('.')[2]}": f"{rate:.1f} TFLOP/s"})
    source, target = torch.empty(2, numbers, device=device)
    notes.add(copies=f"{2 * source.nbytes / seconds_of(partial(target.copy_, source)) / TERA:.2f} TB/s")


def ours(notes: Notes, rehearse: bool, settings: list[str]) -> None:
    """Measure steps of `anyflow train` with these settings."""
    config, world = _start(settings, rehearse)
    kernel = choose_kernel(config, world.device)
    notes.add(attention=kernel)
    if with_working_compiler(config, world).engine.compile != config.engine.compile:
        raise UserError("engine.compile", "true, but torch.compile does not work here")
    _measure(notes, config, build_recipe(config, world, random_materials(config, world.device)), kernel)


def published(notes: Notes, rehearse: bool, settings: list[str]) -> None:
    """Measure steps of the published way: diffusers' network, and the derivative of all samples.

    The first setting is the kernel of attention: `own` for diffusers', or `ours`.
    """
    attention, *settings = settings
    config, world = _start(settings, rehearse)
    kernel = choose_kernel(config, world.device) if attention == "ours" else "sdpa"
    notes.add(attention=kernel)
    # The updates are ours. They do not depend on the network that they were built with, so that can be small.
    shallow, _ = _start([*settings, *EVERYWHERE, "student.architecture.num_layers=1"], rehearse)
    recipe = build_recipe(shallow, world, random_materials(shallow, world.device))
    with torch.device(world.device):
        network = StockTransformer(**config.student.architecture.arguments())
    nn.Module.to(network, world.device)  # buffers too
    network.enable_gradient_checkpointing()
    engine = build_engine(world, network, dict(network.named_parameters()), config.optimizer)
    flow_map = StockFlowMap(network, autocast_dtype(config.engine.precision))
    student = Trainable(network, engine, config.optimizer, Ema(engine.shards(), config.optimizer.ema))
    _measure(notes, config, replace(recipe, trainables={"student": student}, roles=Roles(flow_map, flow_map)), kernel)


@dataclass(frozen=True)
class StockFlowMap:
    """diffusers' network as a flow map. It requires times per frame."""

    network: nn.Module
    dtype: torch.dtype | None

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        times = [(TIME_SCALE * time)[:, None].expand(-1, x.shape[1]) for time in (t, r)]
        with torch.autocast(x.device.type, self.dtype, enabled=self.dtype is not None):
            return self.network(x, *times, condition.text, return_dict=False)[0].float()


def random_materials(config: RunConfig, device: torch.device) -> Materials:
    """Random weights, drawn on the device, in place of those of files."""
    # The spread is that of a layer of this width; norms start with it too, which only makes values smaller.
    source = fake_source(config.student.arguments(), lambda shape: 0.02 * torch.randn(shape, device=device))
    return Materials(lambda _: source, lambda key, _: source)


def random_batches(config: RunConfig, step: int, device: torch.device) -> list[Batch]:
    """Random samples of a step, drawn on the device, with the longest texts."""
    generator = torch.Generator(device).manual_seed(step)
    batches = []
    for positions in local_positions(config.engine.global_batch, config.engine.micro_batch, 1, 0):
        batch = fake_batch(config, positions, max(config.data.text_lengths)).to(device)
        for tensor in (batch.latents, batch.condition.text, batch.negative.text):
            tensor.normal_(generator=generator)
        batches.append(batch)
    return batches


def seconds_of(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a call, after one that is not measured."""
    found = []
    for _ in range(repeats + 1):
        start = _now()
        call()
        found.append(_now() - start)
    return statistics.median(found[1:])


def _start(settings: Sequence[str], rehearse: bool) -> tuple[RunConfig, World]:
    config = compose("train", [*(SMALL if rehearse else ()), *settings], None, 1)
    return config, start_world(config.engine)


def _measure(notes: Notes, config: RunConfig, recipe: Recipe, kernel: str) -> None:
    """Make a step that is not measured, and up to `MOST_STEPS` measured ones if they fit in the time; then plan it."""
    device, seconds = recipe.world.device, []
    batches = random_batches(config, 0, device)
    draws = [Draw(0, 0, batch.positions, device) for batch in batches]  # always the same: so is the work
    gpu = device.type == "cuda"
    with attention_by(kernel):
        while len(seconds) <= MOST_STEPS and (len(seconds) < 2 or notes.left > 2 * seconds[-1]):
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            start = _now()
            for update in recipe.updates:
                trainable = recipe.trainables[update.role]
                report = make_update(update, trainable, recipe.roles, batches, draws, 1e-5, "")
                if not report.applied:
                    notes.add(wrong="a loss or a gradient is not finite")
                if trainable.ema is not None:
                    trainable.ema.update(len(seconds))
            seconds.append(_now() - start)
            notes.add(first_step=seconds[0], steps=len(seconds) - 1, seconds=statistics.median(seconds[1:] or seconds))
            if gpu:
                notes.add(gib=torch.cuda.max_memory_allocated() / GIB)
    found = dry_run(config, 1)
    notes.add(planned_gib=plan_memory(config, found, "ddp", 1).tensors / GIB, tflop=found.work / TERA)
    known = known_gpu(torch.cuda.get_device_name(device)) if gpu else None
    if known is not None:
        notes.add(mfu=utilisation(found.work, known, 1, statistics.median(seconds[1:])))


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
