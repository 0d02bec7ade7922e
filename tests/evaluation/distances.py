"""Values of the package's estimators for independent samples, without intervals."""

from __future__ import annotations

from torch import Tensor

from anyflow_train.evaluation.intervals import EnergyReference, SlicedReference, resample, single_stratum


def energy_distance(x: Tensor, y: Tensor) -> float:
    """Compute the unbiased energy distance of (n, ...) and (m, ...) samples."""
    left, right = (resample(single_stratum(len(side)), 0, 0) for side in (x, y))
    return float(EnergyReference(y, right).replicates(x, left)[0])


def sliced_wasserstein(x: Tensor, y: Tensor, count: int = 64) -> float:
    """Compute the sliced 2-Wasserstein distance on `count` directions; it is biased upwards."""
    left, right = (resample(single_stratum(len(side)), 0, 0) for side in (x, y))
    return float(SlicedReference(y, right, count).replicates(x, left)[0].sqrt())
