"""A process of a launch: a student and a fake score on one base, each with an engine of its own, train each other."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from anyflow_train.config.network import Lora, Student
from anyflow_train.config.run import Engine as EngineConfig
from anyflow_train.config.run import Optimizer
from anyflow_train.flow.types import Condition, FlowMap
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.models.shared_base import SharedBase
from anyflow_train.training import launched
from anyflow_train.training.ema import AveragedFlowMap, Ema
from anyflow_train.training.engine import Engine, build_engine
from anyflow_train.training.entry import read_entries
from anyflow_train.training.networks import start_shared
from anyflow_train.training.world import World, start_world
from tests.training.helpers import SHAPE, TEXT_DIM, settings

STEPS, BATCH, LAYERS = 6, 4, 2
STUDENT = Lora(kind="lora", rank=2, alpha=2.0, full_modules=("time_embedder", "delta_embedder"))
FAKE = Lora(kind="lora", rank=3, alpha=3.0, full_modules=("proj_out",))
OPTIMIZER = Optimizer(lr=1e-3)


def shared_base(source: str, world: World) -> SharedBase:
    """The student's adapters are new ones on a network, or a run's own on the base of that run."""
    given = settings(Path(), student__init=source, student__adapter=STUDENT.model_dump())["student"]
    given["architecture"]["num_layers"] = LAYERS
    return start_shared(Student.model_validate({**given, "time_frequency_limit": None}), 0, world)


def train(source: str, world: World) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Losses of every step, and both roles' weights and moments after the last."""
    base = shared_base(source, world)
    base.add("fake", FAKE, seed=1)
    base.network.enable_gradient_checkpointing()
    engines = {role: build_engine(world, base.network, base.parameters(role), OPTIMIZER) for role in base.roles}
    maps: dict[str, FlowMap] = {
        role: base.flow_map(role, NetworkFlowMap(engine.network, None)) for role, engine in engines.items()
    }
    maps["teacher"] = base.flow_map(None, NetworkFlowMap(engines["student"].network, None))
    average = Ema(engines["student"].shards(), OPTIMIZER.ema.model_copy(update={"start_step": 1, "decay": 0.9}))
    maps["averaged"] = AveragedFlowMap(maps["student"], average)
    losses = []
    for step in range(STEPS):
        batch = draws(step, world)
        # Two fake updates for one of the student, and each calls the other's flow map between.
        row = [update(engines["fake"], fake_loss(maps, *batch), world)]
        if step % 2:
            row.append(update(engines["student"], student_loss(maps, *batch), world))
            average.update(step)
        losses.append(row)
        if step == STEPS // 2:
            restore(engines)
    return losses, state(engines)


def draws(step: int, world: World) -> tuple[Tensor, Tensor, Condition]:
    """This process's noises, times and texts of a global batch."""
    generator = torch.Generator().manual_seed(step)
    noise, other = torch.randn(2, BATCH, *SHAPE, generator=generator)
    t, text = torch.rand(BATCH, generator=generator), torch.randn(BATCH, 4, TEXT_DIM, generator=generator)
    own = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    return torch.stack((noise[own], other[own])), t[own], Condition(text[own])


def student_loss(maps: Mapping[str, FlowMap], noise: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Two jumps with gradient, then a detached difference of scores, and one of the averaged student."""
    one, half, zero = torch.ones_like(t), torch.full_like(t, 0.5), torch.zeros_like(t)
    x = noise[0] - 0.5 * maps["student"](noise[0], one, half, condition)
    x = x - 0.5 * maps["student"](x, half, zero, condition)
    with torch.no_grad():
        share = t.view(-1, 1, 1, 1, 1)
        seen = (1 - share) * x + share * noise[1]
        gradient = maps["fake"](seen, t, t, condition) - maps["teacher"](seen, t, t, condition)
        gradient += 0.1 * maps["averaged"](seen, t, zero, condition)
    return (x - (x - gradient).detach()).square().flatten(1).mean(1).sum() / BATCH


def fake_loss(maps: Mapping[str, FlowMap], noise: Tensor, t: Tensor, condition: Condition) -> Tensor:
    with torch.no_grad():
        x = noise[0] - maps["student"](noise[0], torch.ones_like(t), torch.zeros_like(t), condition)
    share = t.view(-1, 1, 1, 1, 1)
    velocity = maps["fake"]((1 - share) * x + share * noise[1], t, t, condition)
    return (velocity - (noise[1] - x)).square().flatten(1).mean(1).sum() / BATCH


def update(engine: Engine, loss: Tensor, world: World) -> float:
    """The loss of all processes; after it the optimizer has stepped."""
    engine.backward(loss)
    outcome = engine.step(1e-3, loss.detach().reshape(1))
    assert outcome.applied
    return outcome.values[0]


def state(engines: Mapping[str, Engine]) -> dict[str, Tensor]:
    kinds = [(role, kind) for role in engines for kind in ("weights", "exp_avg", "exp_avg_sq")]
    return {
        f"{role}: {kind}: {name}": tensor.detach().clone()
        for role, kind in kinds
        for name, tensor in read_entries(engines[role].entries(kind))
    }


def restore(engines: Mapping[str, Engine]) -> None:
    """Read everything, train nothing, and write it back: as a resume does, which must not reach the other role."""
    kinds = [(engine, kind) for engine in engines.values() for kind in ("weights", "exp_avg", "exp_avg_sq")]
    saved = [{name: tensor.clone() for name, tensor in read_entries(e.entries(kind))} for e, kind in kinds]
    for factor in (0.0, 1.0):
        for (engine, kind), tensors in zip(kinds, saved, strict=True):
            for name, entry in engine.entries(kind).items():
                entry.write(factor * tensors[name])


def main(cases: list[dict[str, Any]], results: Path) -> int:
    from tests.training.worker import no_compilation

    no_compilation()
    world = start_world(EngineConfig(device="cpu", threads=1))
    for case in cases:
        stage = case["engine"].removeprefix("zero")  # as accelerate tells it
        os.environ["ACCELERATE_USE_DEEPSPEED"] = str(stage.isdigit()).lower()
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = stage
        losses, tensors = train(case["source"], world)
        if world.is_main:
            save_file(tensors, case["out"], metadata={"losses": json.dumps(losses)})
    return 0


if __name__ == "__main__":
    launched.end(main(json.loads(sys.argv[1]), Path(sys.argv[2])))
