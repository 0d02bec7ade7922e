"""A run is a list of updates: which role is trained on which terms, and how an update is made from a step's batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from anyflow_train.config.positions import Branch
from anyflow_train.config.run import Optimizer as OptimizerConfig
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.objectives.rebalance import Rebalance, balance_value, rebalanced
from anyflow_train.objectives.types import Loss, Objective, Roles
from anyflow_train.training.ema import Ema
from anyflow_train.training.engine import Engine
from anyflow_train.training.processes.world import World


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss of an update.

    Attributes:
        name: of the term in the logs.
        objective: gives the losses of a micro-batch.
        weight: factor of the term in the update's loss.
        rebalance: how samples with r < t are scaled.
        diffusion: the global batch's number of diffusion samples, over which rebalancing averages.
        probability: share of the steps that have the term, drawn once a step for all samples.
        smallest_mean: what the diffusion samples' mean loss counts as at least, for rebalancing.
    """

    name: str
    objective: Objective
    weight: float = 1.0
    rebalance: Rebalance = "none"
    diffusion: int = 0
    probability: float = 1.0
    smallest_mean: float = 0.0

    def due(self, draw: Draw) -> bool:
        """Whether the step that these random numbers are for has the term: the same on every process."""
        return self.probability == 1 or draw.shared(f"{self.name} is due", 1)[0] < self.probability

    def __post_init__(self) -> None:
        if self.rebalance != "none" and self.diffusion == 0:
            raise ValueError("rebalancing scales to the diffusion samples' mean loss, but there are none")


@dataclass(frozen=True)
class Update:
    """One optimizer step of one role, every `every` steps."""

    role: str
    terms: tuple[Term, ...]
    every: int = 1


@dataclass(frozen=True)
class Trainable:
    """A role that is trained.

    Attributes:
        network: holds the parameters, trained and frozen.
        engine: optimizer and gradients of the trained ones.
        optimizer: how the learning rate goes.
        ema: their averages; None for a role that is only a means.
    """

    network: nn.Module
    engine: Engine
    optimizer: OptimizerConfig
    ema: Ema | None


@dataclass(frozen=True)
class UpdateReport:
    """What came of one update.

    Attributes:
        applied: False if a loss or the gradient was not finite: nothing was changed.
        values: name -> number, to log.
        nonfinite_samples: if not applied, keys of the samples with a non-finite loss, or of all samples if only the
            gradient was not finite.
    """

    applied: bool
    values: dict[str, float]
    nonfinite_samples: tuple[str, ...]


class DiffusionMean:
    """A term's mean loss over the global batch's diffusion samples, all-reduced once a step.

    Positions are in branch order, so the mean is complete in the first micro-step (of all processes together) that
    holds a sample of another branch: before its loss is back-propagated, and before any sample needs it.
    """

    def __init__(self, term: Term, world: World) -> None:
        self._term, self._world = term, world
        self._sum = torch.zeros((), device=world.device)
        self._mean: Tensor | None = None

    def after(self, loss: Loss, positions: tuple[int, ...]) -> Tensor:
        """The mean, () float32, as of this micro-batch. Before it is complete, no sample needs it."""
        if loss.branch is None or self._term.rebalance == "none":  # no sample is scaled
            return self._sum
        if self._mean is not None:
            return self._mean
        values = balance_value(loss, self._term.rebalance)
        self._sum += torch.where(loss.branch == Branch.DIFFUSION, values, 0).sum()
        width = len(positions) * self._world.data_size
        end = (positions[0] // width + 1) * width
        if end <= self._term.diffusion:
            return self._sum
        self._mean = self._world.all_reduce_sum(self._sum) / max(self._term.diffusion, 1)
        return self._mean


class StepStatistics:
    """Sums over this process's samples, kept on the device until the step's one synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, str] = {}
        self._samples: list[tuple[tuple[str, ...], Tensor]] = []

    def see(self, prefix: str, loss: Loss, total: Tensor, keys: tuple[str, ...]) -> None:
        """Count a micro-batch: its final losses' sum, its bare losses by branch, its metrics."""
        values = loss.per_sample.detach().float()
        self._samples.append((keys, values))
        self._add("loss", total.detach().float())
        if loss.branch is not None:
            self._see_branches(prefix, values, loss.branch)
        elif prefix:  # one term's alone is the total
            self._add(f"{prefix}loss", values.sum())
        for name, metric in loss.metrics.items():
            self._add(prefix + name, metric.float().sum())

    def _see_branches(self, prefix: str, values: Tensor, branches: Tensor) -> None:
        for branch in Branch:
            member = branches == branch
            name = f"{prefix}loss_{branch.name.lower()}"
            self._counts[name] = f"count of {name}"
            self._add(name, torch.where(member, values, 0).sum())
            self._add(self._counts[name], member.sum().float())

    def sums(self) -> Tensor:
        """(K,) float32."""
        return torch.stack(list(self._sums.values()))

    def means(self, sums: Sequence[float], global_batch: int) -> dict[str, float]:
        """The sums of all processes -> means over the global batch, or over a branch, which is left out where empty."""
        named = dict(zip(self._sums, sums, strict=True))
        counts = {name: named[self._counts[name]] if name in self._counts else global_batch for name in named}
        hidden = set(self._counts.values())
        return {name: value / counts[name] for name, value in named.items() if name not in hidden and counts[name]}

    def nonfinite_samples(self, world: World) -> tuple[str, ...]:
        """Keys of all processes' samples whose loss is not finite, or of all. Waits: only for skipped steps."""
        own = [
            (key, fine)
            for keys, values in self._samples
            for key, fine in zip(keys, values.isfinite().tolist(), strict=True)
        ]
        rows = [row for rows in world.gather(own) for row in rows]
        bad = [key for key, fine in rows if not fine]
        return tuple(dict.fromkeys(bad or [key for key, _ in rows]))

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value if name in self._sums else value


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
        batches, draws: this process's micro-batches in position order, and their random numbers.
        prefix: of the names in the report.
    """
    engine, statistics = trainable.engine, StepStatistics()
    global_batch = sum(len(batch.positions) for batch in batches) * engine.world.data_size
    means = {term.name: DiffusionMean(term, engine.world) for term in update.terms}
    for batch, draw in zip(batches, draws, strict=True):
        for term in update.terms:
            if not term.due(draw):
                continue
            loss = term.objective(roles, batch, draw)
            mean = means[term.name].after(loss, batch.positions)
            total = term.weight * rebalanced(loss, mean, term.rebalance, term.smallest_mean).sum()
            engine.backward(total / global_batch)
            statistics.see(f"{term.name}/" if len(update.terms) > 1 else "", loss, total, batch.keys)
    outcome = engine.step(learning_rate, statistics.sums())
    values = {**statistics.means(outcome.values, global_batch), "gradient_norm": outcome.gradient_norm}
    nonfinite_samples = () if outcome.applied else statistics.nonfinite_samples(engine.world)
    return UpdateReport(outcome.applied, {prefix + name: value for name, value in values.items()}, nonfinite_samples)
