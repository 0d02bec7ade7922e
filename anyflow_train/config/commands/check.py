"""Keys of `anyflow check`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from anyflow_train.config.base import Model
from anyflow_train.config.commands.types import HalfWidth


class CheckOptions(Model):
    """Keys of `anyflow check`, in addition to the keys of a run.

    derivative: also measure the error of the time derivative on real weights and data.
    derivative_weights: run or checkpoint whose averaged weights are used; null uses the run's initial weights.
    derivative_samples: number of samples of the run's data to measure on.
    derivative_epsilons: half-widths of the central difference to compare; time runs from 0 to 1.
    """

    derivative: bool = False
    derivative_weights: str | None = None
    derivative_samples: PositiveInt = 32
    derivative_epsilons: Annotated[tuple[HalfWidth, ...], Field(min_length=1)] = (0.001, 0.0025, 0.005, 0.01, 0.02)
