"""How much a sample's loss counts, as a function of its source time."""

from __future__ import annotations

from functools import cache
from math import fsum, sqrt

import torch
from torch import Tensor

from anyflow_train.flow.times import shift_time

GRID_SIZE = 1000


def beta08(t: Tensor, shift: float) -> Tensor:
    """`w(t) ~ t (1 - t)^0.5`, mean 1 over the shifted 1000-point grid; 0 at t = 0 and t = 1. Shape and dtype of t."""
    return t * (1 - t).clamp_min(0).sqrt() / _grid_mean(shift)


def uniform(t: Tensor) -> Tensor:
    """Every time counts the same."""
    return torch.ones_like(t)


@cache
def _grid_mean(shift: float) -> float:
    """Mean of `t (1 - t)^0.5` over shift(k / 1000), k = 1..1000."""
    grid = (shift_time(k / GRID_SIZE, shift) for k in range(1, GRID_SIZE + 1))
    return fsum(t * sqrt(max(1 - t, 0.0)) for t in grid) / GRID_SIZE
