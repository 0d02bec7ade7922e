"""Distances against closed forms."""

import math

import pytest
import torch

from anyflow_train.evaluation.metrics import pairwise_distances, self_distances, squared_errors
from tests.evaluation.closed_forms import gaussian_energy
from tests.evaluation.distances import energy_distance, sliced_wasserstein


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_pairwise_distances_agree_with_the_direct_form_far_from_the_origin():
    x, y = normal(9, 3, 4).double() + 1e5, normal(7, 3, 4, seed=1).double() + 1e5
    direct = (x.flatten(1)[:, None] - y.flatten(1)).norm(dim=2)
    # Centring leaves float64 rounding of the offset, 1e-16 * 1e5; without it, squares of 1e5 would cost 1e-6.
    torch.testing.assert_close(pairwise_distances(x, y), direct, rtol=1e-9, atol=0)


def test_pairwise_distances_do_not_depend_on_the_chunks(monkeypatch):
    x, y = normal(5, 100), normal(6, 100, seed=1)
    whole = pairwise_distances(x, y)
    monkeypatch.setattr("anyflow_train.evaluation.metrics.FEATURES_PER_CHUNK", 7)
    torch.testing.assert_close(pairwise_distances(x, y), whole, rtol=1e-12, atol=1e-12)


def test_a_sample_is_at_distance_zero_from_itself():
    assert self_distances(normal(40, 3000)).diagonal().eq(0).all()


def test_sets_of_different_width_are_refused():
    with pytest.raises(ValueError, match="3 and of 4"):
        pairwise_distances(normal(2, 3), normal(2, 4))


def test_energy_distance_of_gaussians_is_the_closed_form():
    x, y = normal(2000, 1) * 0.5 + 1, normal(3000, 1, seed=1)
    # The standard error at these sizes is about 0.02.
    assert energy_distance(x, y) == pytest.approx(gaussian_energy(1.0, 0.5, 1.0), abs=0.08)


def test_energy_distance_is_unbiased_in_small_samples():
    values = [energy_distance(normal(3, 1, seed=2 * k) + 0.5, normal(4, 1, seed=2 * k + 1)) for k in range(3000)]
    estimates = torch.tensor(values)
    error = float(estimates.std()) / math.sqrt(len(values))
    # The biased form would be off by E|X - X'| (1/3 + 1/4) = 0.66, some 40 standard errors.
    assert abs(float(estimates.mean()) - gaussian_energy(0.5, 1.0, 1.0)) < 4 * error


def test_energy_distance_needs_two_samples():
    with pytest.raises(ValueError, match="at least two samples"):
        energy_distance(normal(1, 3), normal(5, 3))


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimension():
    x = normal(512, 32)
    shift = normal(32, seed=1)
    # Mean over directions of (axis . shift)^2 is |shift|^2 / 32; 4000 directions leave about sqrt(2 / 4000) / 2 = 1 %.
    expected = float(shift.norm()) / math.sqrt(32)
    assert sliced_wasserstein(x, x + shift, count=4000) == pytest.approx(expected, rel=0.04)


def test_sliced_wasserstein_handles_unequal_sizes_exactly_where_they_divide_the_levels():
    x = normal(128, 8)
    assert sliced_wasserstein(x, x.repeat_interleave(4, dim=0)) == 0
    assert sliced_wasserstein(x, x.repeat(2, 1) * 3) == pytest.approx(sliced_wasserstein(x, x * 3))


def test_squared_errors_are_means_over_each_sample():
    x, target = torch.zeros(2, 3, 4), torch.ones(2, 3, 4)
    target[1] = 3
    assert squared_errors(x, target).tolist() == [1, 9]
