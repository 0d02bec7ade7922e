"""Measures of sets of samples against a reference, with the same resamples for all sets."""

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
        model: label of the model.
        steps: network calls (with guidance, each counts for two).
        shift: shift of the time grid.
        energy_distance: unbiased energy distance to the reference.
        sliced_wasserstein: distance to the reference, with the sampling bias removed.
        trajectory_error: root mean square difference from the teacher's fine solution for the same noise.
        energy_ratio: ratio to the teacher's energy distance at the same number of calls; None if that may be zero.
        recognition: result of the oracle, if there is one.
        nearest: distances to the training clips, if these are given.
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
        shift: shift of the time grid.
        energy: (R + 1,) float64, the value first.
    """

    latents: Tensor
    shift: float
    energy: Tensor


class SampleEvaluator:
    """Measures sets of samples that were made from the same inputs.

    Args:
        reference: (m, F, C, H, W) samples that all sets are compared with.
        fine: (n, F, C, H, W), the teacher's fine solution for the same noise.
        strata: (n,) classes of the samples, see `clip_choice.strata`.
        reference_strata: (m,) classes of the reference.
        replicates: number of bootstrap resamples.
        seed: seed of the resamples.

    Attributes:
        reference: the reference samples.
        resampling: resampling of the samples, the same for all sets.
        reference_resampling: resampling of the reference.
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
        """Add the replicates of the energy distance to samples."""
        return SampleSet(latents, shift, self._energy.replicates(latents, self.resampling))

    def cell(
        self,
        model: str,
        steps: int,
        samples: SampleSet,
        teacher: SampleSet | None,
        class_oracle: Callable[[Tensor], Recognition] | None,
    ) -> ResultRow:
        """Compute all measures of a set.

        Args:
            model: label of the model.
            steps: network calls.
            samples: the set.
            teacher: the teacher's set at the same number of calls, for the ratio; None leaves it out.
            class_oracle: checks decoded samples; None leaves it out.
        """
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
