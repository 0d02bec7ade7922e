"""Measures of sets of samples against a reference, with the same resamples for all sets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


@dataclass(frozen=True)
class RealClips:
    """The reference measured as samples are, for comparison.

    Attributes:
        energy_floor: 95 % of sets of as many real clips have a smaller energy distance to the reference.
        recognition: result of the oracle, if there is one.
    """

    energy_floor: float
    recognition: Recognition | None = None


class SampleEvaluator:
    """Measures sets of samples, always with the same resamples.

    Args:
        reference: (m, F, C, H, W) samples that all sets are compared with.
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
        self, reference: Tensor, strata: Tensor, reference_strata: Tensor, replicates: int = 1000, seed: int = 0
    ) -> None:
        self.reference = reference
        self.resampling: Resampling = resample(strata, replicates, 2 * seed)
        self.reference_resampling = resample(reference_strata, replicates, 2 * seed + 1)
        self._energy = EnergyReference(reference, self.reference_resampling)
        self._sliced = SlicedReference(reference, self.reference_resampling)
        self._seed = seed

    def sampled(self, latents: Tensor, shift: float) -> SampleSet:
        """Add the replicates of the energy distance to samples."""
        return SampleSet(latents, shift, self._energy.replicates(latents, self.resampling))

    def sliced_wasserstein(self, latents: Tensor) -> Estimate:
        """Measure the sliced Wasserstein distance of samples to the reference."""
        return reflected(self._sliced.replicates(latents, self.resampling))

    def real(self, recognition: Recognition | None) -> RealClips:
        """Measure the reference against itself."""
        return RealClips(self._energy.floor(torch.bincount(self.resampling.strata), 2 * self._seed), recognition)

    def cell(
        self,
        model: str,
        steps: int,
        samples: SampleSet,
        fine: Tensor,
        teacher: SampleSet | None,
        recognition: Recognition | None,
    ) -> ResultRow:
        """Compute all measures of a set.

        Args:
            model: label of the model.
            steps: network calls.
            samples: the set.
            fine: (n, F, C, H, W), the teacher's fine solution for the same noise.
            teacher: the teacher's set at the same number of calls, for the ratio; None leaves it out.
            recognition: result of the oracle, if there is one.
        """
        errors = weighted_means(squared_errors(samples.latents, fine), self.resampling)
        return ResultRow(
            model,
            steps,
            samples.shift,
            percentile(samples.energy),
            self.sliced_wasserstein(samples.latents),
            percentile(errors.sqrt()),
            None if teacher is None else ratio(samples.energy, teacher.energy),
            recognition,
        )
