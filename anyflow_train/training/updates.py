"""A run is a list of updates. An update trains one role on the sum of its terms."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from anyflow_train.config.run import Optimizer as OptimizerConfig
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.objectives.rebalance import Rebalance, rebalanced
from anyflow_train.objectives.types import Objective, Roles
from anyflow_train.training.ema import Ema
from anyflow_train.training.engine import Engine
from anyflow_train.training.step_statistics import DiffusionMean, StepStatistics


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss of an update.

    Attributes:
        name: name of the term in the logs.
        objective: computes the losses of a micro-batch.
        weight: factor of the term in the update's loss.
        rebalance: how samples with r < t are scaled.
        diffusion: number of diffusion samples in the global batch, over which rebalancing averages.
        probability: probability that a step has the term, drawn once per step for all samples.
        smallest_mean: lower bound of the diffusion samples' mean loss, for rebalancing.
    """

    name: str
    objective: Objective
    weight: float = 1.0
    rebalance: Rebalance = "none"
    diffusion: int = 0
    probability: float = 1.0
    smallest_mean: float = 0.0

    def due(self, draw: Draw) -> bool:
        """Whether the step of these random numbers has the term. The result is equal on every process."""
        return self.probability == 1 or draw.shared(f"{self.name} is due", 1)[0] < self.probability

    def __post_init__(self) -> None:
        if self.rebalance != "none" and self.diffusion == 0:
            raise ValueError("rebalancing needs the mean loss of the diffusion samples, but diffusion is 0")


@dataclass(frozen=True)
class Update:
    """One optimizer step of one role, every `every` steps, among the training steps `steps`."""

    role: str
    terms: tuple[Term, ...]
    every: int = 1
    steps: range = range(sys.maxsize)

    def due(self, step: int) -> bool:
        """Whether a training step, from 0, has the update."""
        return step % self.every == 0 and step in self.steps


@dataclass(frozen=True)
class Trainable:
    """A trained role.

    Attributes:
        network: network with all parameters, trained and frozen.
        engine: optimizer and gradients of the trained parameters.
        optimizer: config of the optimizer and its learning-rate schedule.
        ema: averages of the trained parameters; None for a role that only helps to train the student.
    """

    network: nn.Module
    engine: Engine
    optimizer: OptimizerConfig
    ema: Ema | None


@dataclass(frozen=True)
class UpdateReport:
    """The result of one update.

    Attributes:
        applied: False if a loss or the gradient was not finite; then nothing has changed.
        values: numbers for the log, by name.
        nonfinite_samples: if not applied, keys of the samples with a non-finite loss, or of all samples if only the
            gradient was not finite.
    """

    applied: bool
    values: dict[str, float]
    nonfinite_samples: tuple[str, ...]


def make_update(
    update: Update,
    trainable: Trainable,
    roles: Roles,
    batches: Sequence[Batch],
    draws: Sequence[Draw],
    learning_rate: float,
    prefix: str,
) -> UpdateReport:
    """Accumulate the gradient of all terms over a step's micro-batches, then step the optimizer once.

    Args:
        batches: this process's micro-batches, in the order of their positions.
        draws: random numbers of each micro-batch.
        prefix: prefix of the names in the report.
    """
    engine, statistics = trainable.engine, StepStatistics()
    global_batch = sum(len(batch.positions) for batch in batches) * engine.world.data_size
    means = {
        (term.name, turn): DiffusionMean(term.rebalance, term.diffusion, engine.world)
        for term in update.terms
        for turn in {batch.turn for batch in batches}
    }
    for batch, draw in zip(batches, draws, strict=True):
        for term in update.terms:
            if not term.due(draw):
                continue
            loss = term.objective(roles, batch, draw)
            mean = means[term.name, batch.turn].after(loss, batch.positions)
            total = loss.per_sample.new_zeros(())
            for part in loss.parts():
                own = term.weight * rebalanced(part, mean, term.rebalance, term.smallest_mean).sum()
                engine.backward(own / global_batch)
                total = total + own.detach()
            statistics.add(f"{term.name}/" if len(update.terms) > 1 else "", loss, total, batch.keys)
    outcome = engine.step(learning_rate, statistics.sums())
    values = {**statistics.means(outcome.values, global_batch), "gradient_norm": outcome.gradient_norm}
    nonfinite_samples = () if outcome.applied else statistics.nonfinite_samples(engine.world)
    return UpdateReport(outcome.applied, {prefix + name: value for name, value in values.items()}, nonfinite_samples)
