"""What a dry run has in place of files, random numbers and optimizers: all of it fake tensors."""

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
"""A uniform number that decides against what has a small probability."""


def stored_architecture(source: str | None) -> Architecture | None:
    """The architecture of a pipeline folder, transformer folder or published network; None for all others."""
    for place in ("transformer", ".") if source else ():
        path = Path(source or "")
        alone = is_weights_file(path)
        stored = architecture(read_shapes(path), path) if alone else read_object(path / place / "config.json")
        with suppress(ValueError):  # a run that starts from this folder says what is wrong with it
            if stored:
                return Architecture.model_validate({k: v for k, v in stored.items() if k in Architecture.model_fields})
    return published(source)


def fake_source(arguments: Mapping[str, Any], make: Callable[[torch.Size], Tensor] = torch.empty) -> WeightSource:
    """Weights such as a network of these constructor arguments has, each made when it is read."""
    parameters = build_empty(arguments).named_parameters()
    tensors = {name: partial(make, parameter.shape) for name, parameter in parameters}
    # All have the same source, so roles that share a base find that their bases are the same.
    return WeightSource("made-up weights", PretrainedWeights(arguments, tensors))


def fake_materials(meter: Meter, blocks: Callable[[int], int], student: Architecture, assumed: list[str]) -> Materials:
    """Weights without files, and engines that only sum up gradients.

    Args:
        blocks: gives the number of blocks to build of a network that has so many.
        student: its architecture as it is built, which a source is taken to have if its config is not here.
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
    """Sums up gradients, as an engine does, and forgets them at the step.

    The optimizer's state is left out: `plan.states` says what each engine keeps of it.
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
        """All parameters that are trained, by model name."""
        return dict(self._parameters)


@dataclass(frozen=True)
class DryDraw(Draw):
    """Fake noise, and even numbers in place of random ones where a number decides what is computed.

    Attributes:
        variant, variants: which of so many draws of a step's shared numbers this is. Together they cover the square of
            two such numbers evenly.
        drop: whether samples take part in what has a probability, such as dropping their text: in its share of the
            samples, or not at all.
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
        """The first number of all variants takes even steps, the second is spread evenly over every range of the first,
        and so on with other bases."""
        self.asked.append(purpose)
        first = (self.variant + 0.5) / self.variants
        others = (2, 3, 5, 7)[: columns - 1]
        return [first, *(min(radical_inverse(self.variant, base) + 0.5 / self.variants, NEVER) for base in others)]

    def chances(self, purpose: str) -> tuple[float, ...]:
        """Evenly spread over the samples."""
        if not self.drop:
            return (NEVER,) * len(self.positions)
        return tuple((position + 0.5) / len(self.positions) for position in self.positions)


def radical_inverse(number: int, base: int) -> float:
    """The digits of a number mirrored at the point (van der Corput): evenly spread over [0, 1) for 0, 1, 2, ..."""
    value, place = 0.0, 1 / base
    while number:
        number, digit = divmod(number, base)
        value, place = value + digit * place, place / base
    return value


def fake_batch(config: RunConfig, positions: tuple[int, ...], text_length: int) -> Batch:
    """A micro-batch of these samples of the global batch, of the largest size."""
    architecture = config.student.architecture
    latents = torch.empty(len(positions), *latent_shape(largest(config.data), architecture.in_channels))

    def text(rows: int) -> Condition:
        return Condition(torch.empty(rows, text_length, architecture.text_dim))

    return Batch(latents, text(len(positions)), text(1), ("",) * len(positions), positions)
