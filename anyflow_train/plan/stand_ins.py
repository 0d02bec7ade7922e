"""Stand-ins of a dry run for files, random numbers and optimizers, all of them of fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from anyflow_train.config.derived import largest, latent_shape
from anyflow_train.config.network import Architecture, published
from anyflow_train.config.original import architecture, is_weights_file, read_shapes
from anyflow_train.config.run import Optimizer, RunConfig
from anyflow_train.data.batch import Batch
from anyflow_train.files import read_object
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition
from anyflow_train.models.build import build_empty
from anyflow_train.models.pretrained import PretrainedWeights
from anyflow_train.plan.meter import Meter
from anyflow_train.training.engine import Outcome
from anyflow_train.training.materials import Materials
from anyflow_train.training.processes.world import World
from anyflow_train.training.weight_source import WeightSource

NEVER = 0.999
"""Uniform number that decides against everything that has a small probability."""


def stored_architecture(source: str | None) -> Architecture | None:
    """Read the architecture of a pipeline folder, transformer folder or published network; None for all others."""
    for place in ("transformer", ".") if source else ():
        path = Path(source or "")
        alone = is_weights_file(path)
        stored = architecture(read_shapes(path), path) if alone else read_object(path / place / "config.json")
        with suppress(ValueError):  # a run that starts from this folder says what is wrong with it
            if stored:
                return Architecture.model_validate({k: v for k, v in stored.items() if k in Architecture.model_fields})
    return published(source)


def fake_source(arguments: Mapping[str, Any], make: Callable[[torch.Size], Tensor] = torch.empty) -> WeightSource:
    """Open made-up weights of a network with these constructor arguments. Each tensor is made when it is read."""
    parameters = build_empty(arguments).named_parameters()
    tensors = {name: partial(make, parameter.shape) for name, parameter in parameters}
    # All have the same source, because roles that share a base compare the sources of their weights.
    return WeightSource("made-up weights", PretrainedWeights(arguments, tensors))


def fake_materials(meter: Meter, blocks: Callable[[int], int], student: Architecture, assumed: list[str]) -> Materials:
    """Materials of a recipe whose weights need no files, and whose engines only sum up gradients.

    Args:
        blocks: maps the number of blocks of a network to the number of blocks to build.
        student: architecture of the student as it is built. A source whose config is not here is assumed to have it.
        assumed: collects the roles for which that was assumed.
    """

    def open_role(key: str, source: str) -> WeightSource:
        found = stored_architecture(source)
        if found is not None:
            return fake_source({**found.arguments(), "num_layers": blocks(found.num_layers)})
        assumed.append("teacher" if key.startswith("teacher.") else "fake_score")
        return fake_source(student.model_copy(update={"causal": None}).arguments())

    def build_engine(world: World, network: nn.Module, parameters: Mapping[str, Parameter], config: Optimizer) -> Any:
        return DryEngine(world, network, parameters, meter)

    return Materials(lambda student: fake_source(student.arguments()), open_role, build_engine, lambda: 0)


class DryEngine:
    """Engine that sums up gradients and forgets them at the step.

    It has no optimizer, because `plan.states` says how much memory each engine keeps for it.
    """

    def __init__(self, world: World, network: nn.Module, parameters: Mapping[str, Parameter], meter: Meter) -> None:
        self.world, self.network, self.optimizer = world, network, None
        self._parameters, self._meter = dict(parameters), meter
        for parameter in self._parameters.values():
            meter.watch_gradient(parameter)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar loss."""
        loss.backward()

    def step(self, learning_rate: float, watched: Tensor) -> Outcome:
        """Forget the gradients. Nothing is updated."""
        self._meter.note()
        for parameter in self._parameters.values():
            parameter.grad = None
        return Outcome(True, 0.0, (0.0,) * len(watched))

    def shards(self) -> dict[str, Tensor]:
        """Parameters that are trained, all of them whole, by model name."""
        return dict(self._parameters)


@dataclass(frozen=True)
class DryDraw(Draw):
    """Fake noise, with evenly spread numbers where a random number would decide what is computed.

    Attributes:
        variant: number of this draw of a step's shared numbers, from 0.
        variants: how many such draws there are. Together they cover the square of two shared numbers evenly.
        drop: whether something with a probability, such as dropping the text, happens to its share of the samples. If
            false, it happens to none.
        asked: collects the purposes of shared numbers that were asked for.
    """

    variant: int = 0
    variants: int = 1
    drop: bool = True
    asked: list[str] = field(default_factory=list)

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) float32."""
        return torch.empty(len(self.positions), *shape)

    def uniform(self, purpose: str, columns: int) -> Tensor:
        """(B, columns) float32."""
        return torch.empty(len(self.positions), columns)

    def shared(self, purpose: str, columns: int) -> list[float]:
        """Spread the shared numbers evenly over all variants (a Hammersley set).

        The first number takes even steps; each other number is a radical inverse with a base of its own.
        """
        self.asked.append(purpose)
        first = (self.variant + 0.5) / self.variants
        others = (2, 3, 5, 7)[: columns - 1]
        return [first, *(min(radical_inverse(self.variant, base) + 0.5 / self.variants, NEVER) for base in others)]

    def chances(self, purpose: str) -> tuple[float, ...]:
        """Numbers that decide by a probability, spread evenly over the samples."""
        if not self.drop:
            return (NEVER,) * len(self.positions)
        return tuple((position + 0.5) / len(self.positions) for position in self.positions)


def radical_inverse(number: int, base: int) -> float:
    """Mirror the digits of a number at the point (van der Corput). For 0, 1, 2, ... this fills [0, 1) evenly."""
    value, place = 0.0, 1 / base
    while number:
        number, digit = divmod(number, base)
        value, place = value + digit * place, place / base
    return value


def fake_batch(config: RunConfig, positions: tuple[int, ...], text_length: int) -> Batch:
    """Make a micro-batch of the largest size, from these positions of the global batch."""
    architecture = config.student.architecture
    latents = torch.empty(len(positions), *latent_shape(largest(config.data), architecture.in_channels))

    def text(rows: int) -> Condition:
        return Condition(torch.empty(rows, text_length, architecture.text_dim))

    return Batch(latents, text(len(positions)), text(1), ("",) * len(positions), positions)
