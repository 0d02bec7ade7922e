"""Bootstrap intervals: coverage by simulation, and the traps they avoid."""

import pytest
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
    single_stratum,
    weighted_means,
)
from anyflow_train.evaluation.metrics import directions
from tests.evaluation.closed_forms import gaussian_energy, mixture_energy
from tests.evaluation.distances import sliced_wasserstein

TRIALS = 200
REPLICATES = 200
# Of 200 trials at 95 %, between 178 (89 %) and all cover, but for one case in 10,000. Intervals near zero are wide on
# purpose: the bootstrap of a degenerate statistic errs on the safe side.
LOWEST_COVERAGE = 0.89


def plain(samples: int, seed: int) -> Resampling:
    return resample(single_stratum(samples), REPLICATES, seed)


def energy_replicates(x: Tensor, y: Tensor, trial: int) -> Tensor:
    reference = EnergyReference(y, plain(len(y), 2 * trial + 1))
    return reference.replicates(x, plain(len(x), 2 * trial))


@pytest.mark.parametrize("shift", [1.0, 0.3, 0.0])
def test_energy_intervals_cover(shift: float):
    truth = gaussian_energy(shift, 1.0, 1.0)
    generator = torch.Generator().manual_seed(1)
    hits = 0
    for trial in range(TRIALS):
        x = shift + torch.randn(40, 1, generator=generator)
        y = torch.randn(80, 1, generator=generator)
        estimate = percentile(energy_replicates(x, y, trial))
        hits += estimate.low <= truth <= estimate.high
    assert hits / TRIALS >= LOWEST_COVERAGE


def test_copies_of_a_sample_do_not_pull_the_replicates_down():
    x, y = torch.randn(20, 5, generator=torch.Generator().manual_seed(0)), torch.randn(30, 5)
    replicates = energy_replicates(x, y, trial=0)
    error = float(replicates.std()) / REPLICATES**0.5
    # Counting the copies would move the mean by E|X - X'| (1/20 + 1/30), about 0.25.
    assert abs(float(replicates[1:].mean() - replicates[0])) < 4 * error < 0.1


@pytest.mark.parametrize("classes", [1, 4])
def test_the_floor_is_above_95_percent_of_real_sets(classes: int):
    """Sets from the distribution of the reference, with equally many samples of each class."""
    generator = torch.Generator().manual_seed(2)
    strata, reference_strata = (torch.arange(classes).repeat(count // classes) for count in (24, 96))
    below = []
    for trial in range(TRIALS):
        x, y = (2.0 * groups + torch.randn(len(groups), generator=generator) for groups in (strata, reference_strata))
        reference = EnergyReference(y[:, None], resample(reference_strata, REPLICATES, 2 * trial + 1))
        value = reference.replicates(x[:, None], resample(strata, REPLICATES, 2 * trial))[0]
        below.append(value < reference.floor(torch.bincount(strata), 2 * trial))
    # Of 200 trials at 95 %, between 180 and 198 are below, except for one case in 1,000.
    assert 180 <= sum(below) <= 198


def test_estimates_are_written_with_their_intervals():
    assert str(Estimate(0.5121, -0.1, 1.0)) == "0.512 [-0.100, 1.000]"
    assert Estimate(0.5121, -0.1, 1.0).as_distance() == "0.512 [0.000, 1.000]"
    assert Estimate(-0.1, -0.3, 0.2).as_distance() == "at the floor (< 0.200)"


@pytest.mark.parametrize("per_class", [4, 20])
def test_stratified_estimates_are_unbiased_and_cover(per_class: int):
    classes, spacing, shift = 6, 2.0, 1.0
    truth = mixture_energy(shift, spacing, classes)
    generator = torch.Generator().manual_seed(1)
    of_x, of_y = torch.arange(classes).repeat(per_class), torch.arange(classes).repeat(10)
    values, hits = [], 0
    for trial in range(TRIALS):
        x = shift + spacing * of_x[:, None] + torch.randn(len(of_x), 1, generator=generator)
        y = spacing * of_y[:, None] + torch.randn(len(of_y), 1, generator=generator)
        reference = EnergyReference(y, resample(of_y, REPLICATES, 2 * trial + 1))
        estimate = percentile(reference.replicates(x, resample(of_x, REPLICATES, 2 * trial)))
        values.append(estimate.value)
        hits += estimate.low <= truth <= estimate.high
    error = float(torch.tensor(values).std()) / TRIALS**0.5
    assert abs(sum(values) / TRIALS - truth) < 4 * error
    assert hits / TRIALS >= LOWEST_COVERAGE


def test_ratios_of_paired_samples_cover():
    near, far = 0.6, 1.0
    truth = gaussian_energy(near, 1.0, 1.0) / gaussian_energy(far, 1.0, 1.0)
    generator = torch.Generator().manual_seed(1)
    hits, known = 0, 0
    for trial in range(TRIALS):
        z, y = torch.randn(60, 1, generator=generator), torch.randn(120, 1, generator=generator)
        reference, same = EnergyReference(y, plain(120, 2 * trial + 1)), plain(60, 2 * trial)
        estimate = ratio(reference.replicates(z + near, same), reference.replicates(z + far, same))
        known += estimate is not None
        hits += estimate is not None and estimate.low <= truth <= estimate.high
    assert known > 0.9 * TRIALS
    assert hits / known >= LOWEST_COVERAGE


def test_a_ratio_to_something_that_may_be_zero_is_not_given():
    certain, uncertain = torch.linspace(1, 2, 201), torch.linspace(-1, 2, 201)
    assert ratio(certain, uncertain) is None
    estimate = ratio(certain, certain)
    assert estimate is not None
    assert (estimate.low, estimate.value, estimate.high) == (1, 1, 1)


def test_values_are_the_plain_statistics():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(64, 3, 4, generator=generator) + 0.5, torch.randn(128, 3, 4, generator=generator)
    left, right = x.flatten(1).double(), y.flatten(1).double()
    cross, within, other = (torch.cdist(a, b).sum() for a, b in ((left, right), (left, left), (right, right)))
    energy = float(2 * cross / (64 * 128) - within / (64 * 63) - other / (128 * 127))
    assert float(energy_replicates(x, y, trial=0)[0]) == pytest.approx(energy, rel=1e-9)
    squares = SlicedReference(y, plain(128, 1)).replicates(x, plain(64, 0))
    axes = directions(12, 64).double()
    ordered, others = ((side @ axes).sort(dim=0).values for side in (left, right))
    gaps = ordered.repeat_interleave(2, dim=0) - others
    assert float(squares[0]) == pytest.approx(float(gaps.square().mean()), rel=1e-5)


def test_reflection_takes_the_sampling_bias_off_a_sliced_distance():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 30, generator=generator) + 0.2, torch.randn(200, 30, generator=generator)
    estimate = reflected(SlicedReference(y, plain(200, 1)).replicates(x, plain(100, 0)))
    plug_in = sliced_wasserstein(x, y)
    assert estimate.low < 0.2 < estimate.high
    # Each mean of 30 coordinates is off by 0.12; the plug-in value adds the width of the sampling noise to that.
    assert abs(estimate.value - 0.2) < 0.5 * abs(plug_in - 0.2)
    assert estimate.low <= estimate.value <= estimate.high


def test_weights_sum_to_one_over_the_samples_and_equally_over_the_strata():
    strata = torch.tensor([0, 0, 1, 1, 1, 1])
    drawn = resample(strata, 50, seed=0)
    torch.testing.assert_close(drawn.weights[:, strata == 0].sum(1), torch.full((51,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(drawn.weights.sum(1), torch.ones(51, dtype=torch.float64))
    assert weighted_means(strata, drawn)[0] == 0.5


def test_a_stratum_of_one_sample_is_refused():
    with pytest.raises(ValueError, match="two samples"):
        resample(torch.tensor([0, 0, 1]), 10, seed=0)
