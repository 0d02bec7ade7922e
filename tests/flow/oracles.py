"""Closed forms in float64: flow maps of Gaussian and two-mode data, and random numbers for large batches."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

from anyflow_train.flow.draw import Draw
from anyflow_train.flow.path import expand_time
from anyflow_train.flow.types import Condition

NO_TEXT = Condition(torch.zeros(1, 1, 1))


@dataclass(frozen=True)
class GaussianData:
    """Data N(mean, std^2) in every element; `velocity` is E[z - x0 | x_t]; the flow map solves its ODE."""

    mean: float
    std: float

    def spread(self, t: Tensor) -> Tensor:
        """Standard deviation of x_t."""
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        t = expand_time(t, x)
        slope = (t - (1 - t) * self.std**2) / self.spread(t) ** 2
        return -self.mean + slope * (x - (1 - t) * self.mean)

    def map(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        t, r = expand_time(t, x), expand_time(r, x)
        return (1 - r) * self.mean + self.spread(r) / self.spread(t) * (x - (1 - t) * self.mean)

    def average_velocity(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition = NO_TEXT) -> Tensor:
        """Compute `(x - X(x, t, r)) / (t - r)` in a form without division, which is also valid at r = t."""
        t, r = expand_time(t, x), expand_time(r, x)
        slope = (t + r - self.std**2 * (2 - t - r)) / (self.spread(t) * (self.spread(t) + self.spread(r)))
        return -self.mean + slope * (x - (1 - t) * self.mean)


@dataclass(frozen=True)
class GuidedGaussians:
    """The ODE of the guided velocity `v_neg + w (v - v_neg)` of two Gaussians, which is linear in x.

    Its homogeneous solution is a product of powers of the two spreads; the rest is an integral of a smooth function.
    """

    given: GaussianData
    negative: GaussianData
    scale: float
    nodes: int = 48

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(self.negative.velocity(x, t), self.given.velocity(x, t), self.scale)

    def average_velocity(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition = NO_TEXT) -> Tensor:
        points, weights = numpy.polynomial.legendre.leggauss(self.nodes)
        end, moved = self._growth(r), torch.zeros_like(r)
        for point, weight in zip(points.tolist(), weights.tolist(), strict=True):
            s = t + (r - t) * (point + 1) / 2
            moved = moved + weight / 2 * self.velocity(torch.zeros_like(s), s) / self._growth(s)
        length = torch.where(t == r, 1.0, t - r)
        slope, offset = (1 - end / self._growth(t)) / length, end * moved
        average = expand_time(slope, x) * x + expand_time(offset, x)
        return torch.where(expand_time(t == r, x), self.velocity(x, t), average)

    def _growth(self, t: Tensor) -> Tensor:
        return self.given.spread(t) ** self.scale * self.negative.spread(t) ** (1 - self.scale)


@dataclass(frozen=True)
class TwoModes:
    """Data from two Gaussians of equal width. The velocity given x_t is not symmetric. RK4 integrates the map."""

    share: float
    first: float
    second: float
    std: float
    steps: int = 12

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        t = expand_time(t, x)
        variance = (1 - t) ** 2 * self.std**2 + t**2
        distance = [x - (1 - t) * mode for mode in (self.first, self.second)]
        odds = (distance[1] ** 2 - distance[0] ** 2) / (2 * variance)
        first = (odds + math.log(self.share / (1 - self.share))).sigmoid()
        slope = (t - (1 - t) * self.std**2) / variance
        parts = [-mode + slope * d for mode, d in zip((self.first, self.second), distance, strict=True)]
        return first * parts[0] + (1 - first) * parts[1]

    def average_velocity(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition = NO_TEXT) -> Tensor:
        step = (r - t) / self.steps
        move, y = expand_time(step, x), x
        for i in range(self.steps):
            time = t + i * step
            k1 = self.velocity(y, time)
            k2 = self.velocity(y + move / 2 * k1, time + step / 2)
            k3 = self.velocity(y + move / 2 * k2, time + step / 2)
            k4 = self.velocity(y + move * k3, time + step)
            y = y + move / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        length = expand_time(t - r, x)
        return torch.where(length == 0, self.velocity(x, t), (x - y) / torch.where(length == 0, 1.0, length))

    def draw(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        first = torch.rand(shape, generator=generator, dtype=torch.float64) < self.share
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        return torch.where(first, self.first, self.second) + self.std * noise


@dataclass(frozen=True)
class BulkDraw(Draw):
    """Random numbers from one generator for all positions, for Monte-Carlo tests with many samples."""

    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(len(self.positions), *shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, purpose: str, columns: int) -> Tensor:
        return torch.rand(len(self.positions), columns, generator=self.generator, dtype=torch.float64)


def bulk_draw(batch: int, seed: int) -> BulkDraw:
    """Random numbers in float64 for the positions 0..batch-1 of one process."""
    return BulkDraw(seed, 0, tuple(range(batch)), torch.device("cpu"), torch.Generator().manual_seed(seed))
