"""Measure a step of stage 2 part by part: seconds, and memory that each part keeps for its backward pass.

The parts are those of the trainer: the recipe of an experiment, its objectives and engines. The length of rollouts
differs from step to step (N and g are drawn), so the table has means over several steps. Shares are shares of a step.

    python benchmarks/on_policy.py                                       # experiment=tiny_on_policy
    python benchmarks/on_policy.py --experiment tiny_causal_on_policy --steps 16 --clock process
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from common import CLOCKS, heading, write_json
from torch import Tensor

from anyflow_train.config.compose import asset, compose
from anyflow_train.config.derived import latent_shape
from anyflow_train.config.run import RunConfig
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition
from anyflow_train.objectives.distribution_matching import DistributionMatchingObjective, direction
from anyflow_train.training.processes.world import start_world
from anyflow_train.training.recipe import Recipe, build_recipe
from anyflow_train.training.updates import Term, make_update

MIB = 2**20


class Meter:
    """Measures parts of a step: total seconds over all steps, and the largest memory kept for the backward pass."""

    def __init__(self, clock: Callable[[], float], device: torch.device) -> None:
        self._clock, self._device = clock, device
        self.seconds: dict[str, float] = defaultdict(float)
        self.held: dict[str, int] = defaultdict(int)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block, and add up the bytes of the storages that its graph keeps."""
        storages: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        start = self._now()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        self.seconds[name] += self._now() - start
        self.held[name] = max(self.held[name], sum(storages.values()))

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return self._clock()


def main() -> None:
    options = parse()
    config = compose("train", [f"experiment={options.experiment}", f"student.init={asset('tiny-wan')}"])
    world = start_world(config.engine)
    recipe = build_recipe(config, world)
    meter = Meter(CLOCKS[options.clock], world.device)
    for step in range(options.steps + 1):
        if step == 1:  # step 0 is a warm-up
            meter = Meter(CLOCKS[options.clock], world.device)
        one_step(recipe, batch_of(config, world.device, step), Draw(0, step, positions(config), world.device), meter)
    samples = f"{config.engine.micro_batch} samples"
    print(heading(world.device, options.experiment, samples, config.engine.precision, f"{options.clock} seconds"))
    print(f"{'part':38s}{'s/step':>9s}{'share':>8s}{'held for backward':>20s}")
    whole = sum(meter.seconds.values())
    rows = {name: (seconds / options.steps, meter.held[name] / MIB) for name, seconds in meter.seconds.items()}
    for name, (seconds, held) in rows.items():
        print(f"{name:38s}{seconds:9.3f}{seconds * options.steps / whole:8.0%}{held:16.0f} MiB")
    print(f"{'all':38s}{whole / options.steps:9.3f}")
    parts = {name: {"seconds": seconds, "held_mib": held} for name, (seconds, held) in rows.items()}
    facts = {name: getattr(options, name) for name in ("experiment", "steps", "clock")}
    write_json(options.json, world.device, {**facts, "parts": parts})


def one_step(recipe: Recipe, batch: Batch, draw: Draw, meter: Meter) -> None:
    """Do a step like the trainer, with distribution matching in separate parts. The learning rate is 0."""
    student, score = recipe.updates
    matching, *others = student.terms
    engine, roles = recipe.trainables["student"].engine, recipe.roles
    objective = matching.objective
    assert isinstance(objective, DistributionMatchingObjective)
    assert roles.teacher is not None
    assert roles.fake_score is not None
    scoped = draw.scoped("distribution matching")
    with meter.part("rollout, with its graph"):
        made = objective.rollouts(roles.student, batch.condition, scoped, tuple(batch.latents.shape[1:]))
    if objective.endpoints is not None:
        objective.endpoints.put(scoped, batch.turn, made)
    with meter.part("scores of teacher and fake score"):
        found = direction(roles.teacher, roles.fake_score, made.x.detach(), batch.condition, scoped, objective.times)
    with meter.part("back through the rollout"):
        engine.backward((made.x - (made.x - found.gradient).detach()).square().mean())
    for term in others:
        if term.due(draw):
            other_term(recipe, term, batch, draw, meter)
    with meter.part("the student's optimizer and averages"):
        engine.step(0.0, torch.zeros(1, device=batch.latents.device))
        ema = recipe.trainables["student"].ema
        if ema is not None:
            ema.update(0)
    with meter.part("the fake score's update"):
        make_update(score, recipe.trainables["fake_score"], roles, [batch], [draw], 0.0, "")


def other_term(recipe: Recipe, term: Term, batch: Batch, draw: Draw, meter: Meter) -> None:
    """Measure a term of stage 1, without rebalancing, which takes no time."""
    with meter.part(f"{term.name}: forwards"):
        loss = term.objective(recipe.roles, batch, draw).per_sample.mean()
    with meter.part(f"{term.name}: backward"):
        recipe.trainables["student"].engine.backward(loss)


def positions(config: RunConfig) -> tuple[int, ...]:
    """Positions of a step's samples, all in one micro-batch."""
    return tuple(range(config.engine.global_batch))


def batch_of(config: RunConfig, device: torch.device, step: int) -> Batch:
    """Make a batch of random samples with the run's sizes."""
    draw = Draw(1, step, positions(config), torch.device("cpu"))
    length, width = min(config.data.text_lengths), config.student.architecture.text_dim
    latents = draw.normal("data", latent_shape(config.data, config.student.architecture.in_channels))
    keys = tuple(str(position) for position in draw.positions)
    text, negative = Condition(draw.normal("text", (length, width))), Condition(torch.zeros(1, length, width))
    return Batch(latents, text, negative, keys, draw.positions).to(device)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="tiny_on_policy", help="experiment of stage 2")
    parser.add_argument("--steps", type=int, default=12, help="measured steps, after one warm-up")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="process: CPU seconds")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
