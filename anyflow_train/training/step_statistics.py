"""Statistics over the samples of one step, summed over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyflow_train.config.positions import Branch
from anyflow_train.objectives.rebalance import Rebalance, balance_value
from anyflow_train.objectives.types import Loss
from anyflow_train.training.processes.world import World


class DiffusionMean:
    """Mean loss of a term over the diffusion samples of the global batch, all-reduced once per step.

    Positions are in branch order. So the mean is complete in the first micro-step (of all processes together) with a
    sample of another branch, before its loss is back-propagated. No sample needs the mean earlier.

    Args:
        rebalance: rebalancing of the term.
        diffusion: number of diffusion samples in the global batch.
    """

    def __init__(self, rebalance: Rebalance, diffusion: int, world: World) -> None:
        self._rebalance: Rebalance = rebalance
        self._diffusion, self._world = diffusion, world
        self._sum = torch.zeros((), device=world.device)
        self._mean: Tensor | None = None

    def after(self, loss: Loss, positions: tuple[int, ...]) -> Tensor:
        """Add a micro-batch and return the mean, () float32. While it is incomplete, the value is not used."""
        if loss.branch is None or self._rebalance == "none":  # nothing is rescaled
            return self._sum
        if self._mean is not None:
            return self._mean
        values = balance_value(loss, self._rebalance)
        self._sum += torch.where(loss.branch == Branch.DIFFUSION, values, 0).sum()
        width = len(positions) * self._world.data_size
        end = (positions[0] // width + 1) * width
        if end <= self._diffusion:
            return self._sum
        self._mean = self._world.all_reduce_sum(self._sum) / max(self._diffusion, 1)
        return self._mean


class StepStatistics:
    """Sums over this process's samples. They stay on the device until the single host synchronisation of the step."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, str] = {}
        self._samples: list[tuple[tuple[str, ...], Tensor]] = []

    def add(self, prefix: str, loss: Loss, total: Tensor, keys: tuple[str, ...]) -> None:
        """Add a micro-batch of one term.

        Args:
            prefix: prefix of the term's names; empty if it is the update's only term.
            loss: losses before weighting and rebalancing, and metrics.
            total: () sum of the weighted and rebalanced losses.
            keys: names of the samples.
        """
        values = loss.per_sample.detach().float()
        self._samples.append((keys, values))
        self._add("loss", total.detach().float())
        if loss.branch is not None:
            self._add_branches(prefix, values, loss.branch)
        elif prefix:  # a single term's loss is the total
            self._add(f"{prefix}loss", values.sum())
        for name, metric in loss.metrics.items():
            self._add(prefix + name, metric.float().sum())

    def _add_branches(self, prefix: str, values: Tensor, branches: Tensor) -> None:
        for branch in Branch:
            member = branches == branch
            name = f"{prefix}loss_{branch.name.lower()}"
            self._counts[name] = f"count of {name}"
            self._add(name, torch.where(member, values, 0).sum())
            self._add(self._counts[name], member.sum().float())

    def sums(self) -> Tensor:
        """Return all sums as one tensor, (K,) float32."""
        return torch.stack(list(self._sums.values()))

    def means(self, sums: Sequence[float], global_batch: int) -> dict[str, float]:
        """Divide the sums of all processes by the global batch or by the size of a branch. Drops empty branches."""
        named = dict(zip(self._sums, sums, strict=True))
        counts = {name: named[self._counts[name]] if name in self._counts else global_batch for name in named}
        hidden = set(self._counts.values())
        return {name: value / counts[name] for name, value in named.items() if name not in hidden and counts[name]}

    def nonfinite_samples(self, world: World) -> tuple[str, ...]:
        """Keys of all samples with a non-finite loss, else of all samples. All processes must call it."""
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
