"""Loss weights as a function of the source time."""

from __future__ import annotations

from functools import cache
from math import fsum, sqrt

import torch
from torch import Tensor

from anyflow_train.flow.times import shift_time

GRID_SIZE = 1000


def beta08(t: Tensor, shift: float) -> Tensor:
    """Weight `w(t) ~ t (1 - t)^0.5` with mean 1 over the shifted grid of 1000 times. Shape and dtype of t."""
    return t * (1 - t).clamp_min(0).sqrt() / _grid_mean(shift)


def uniform(t: Tensor) -> Tensor:
    """Weight 1 at every time. Shape and dtype of t."""
    return torch.ones_like(t)


@cache
def _grid_mean(shift: float) -> float:
    """Mean of `t (1 - t)^0.5` over shift(k / 1000), k = 1..1000."""
    grid = (shift_time(k / GRID_SIZE, shift) for k in range(1, GRID_SIZE + 1))
    return fsum(t * sqrt(max(1 - t, 0.0)) for t in grid) / GRID_SIZE
