"""Measuring one set of samples against the reference, with common resamples for all sets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from anyflow_train.evaluation.intervals import (
    EnergyReference,
    Estimate,
    Resampling,
    SlicedReference,
    percentile,
    ratio,
    reflected,
    resample,
    weighted_means,
)
from anyflow_train.evaluation.metrics import squared_errors
from anyflow_train.evaluation.nearest import Nearest
from anyflow_train.evaluation.oracle import Recognition


@dataclass(frozen=True)
class ResultRow:
    """One model at one number of calls.

    Attributes:
        model: its label.
        steps: network calls (twice as many under guidance).
        shift: of the time grid.
        energy_distance: unbiased, to the reference.
        sliced_wasserstein: to the reference, the sampling bias taken off.
        trajectory_error: root mean square to the teacher's fine solution from the same noise.
        energy_ratio: to the teacher's energy distance at as many calls; None where that may be zero.
        recognition: the oracle's verdict, where there is one.
        nearest: distances to the training clips, where these are given.
    """

    model: str
    steps: int
    shift: float
    energy_distance: Estimate
    sliced_wasserstein: Estimate
    trajectory_error: Estimate
    energy_ratio: Estimate | None = None
    recognition: Recognition | None = None
    nearest: Nearest | None = None


@dataclass(frozen=True)
class SampleSet:
    """A set of samples with the bootstrap replicates of its energy distance.

    Attributes:
        latents: (n, F, C, H, W) float32.
        shift: of the time grid it was sampled on.
        energy: (R + 1,) float64, the value first.
    """

    latents: Tensor
    shift: float
    energy: Tensor


class SampleEvaluator:
    """Measures sets of samples that were made from the same inputs.

    Args:
        reference: (m, F, C, H, W) samples that all sets are compared with.
        fine: (n, F, C, H, W), the teacher's fine solution from the inputs' noise.
        strata, reference_strata: (n,) and (m,), see `clip_choice.strata`.
        replicates: bootstrap resamples.
        seed: of the resamples.

    Attributes:
        reference: as given.
        resampling: of the samples, the same for every set.
        reference_resampling: of the reference.
    """

    def __init__(
        self, reference: Tensor, fine: Tensor, strata: Tensor, reference_strata: Tensor, replicates: int, seed: int
    ) -> None:
        self.reference = reference
        self._fine = fine
        self.resampling: Resampling = resample(strata, replicates, 2 * seed)
        self.reference_resampling = resample(reference_strata, replicates, 2 * seed + 1)
        self._energy = EnergyReference(reference, self.reference_resampling)
        self._sliced = SlicedReference(reference, self.reference_resampling)

    def sampled(self, latents: Tensor, shift: float) -> SampleSet:
        """The samples with what is needed to rank them."""
        return SampleSet(latents, shift, self._energy.replicates(latents, self.resampling))

    def cell(
        self,
        model: str,
        steps: int,
        samples: SampleSet,
        teacher: SampleSet | None,
        class_oracle: Callable[[Tensor], Recognition] | None,
    ) -> ResultRow:
        """All measures of a set; `teacher` is the teacher's set at as many calls, for the ratio."""
        errors = weighted_means(squared_errors(samples.latents, self._fine), self.resampling)
        return ResultRow(
            model,
            steps,
            samples.shift,
            percentile(samples.energy),
            reflected(self._sliced.replicates(samples.latents, self.resampling)),
            percentile(errors.sqrt()),
            None if teacher is None else ratio(samples.energy, teacher.energy),
            None if class_oracle is None else class_oracle(samples.latents),
        )
