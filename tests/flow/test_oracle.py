"""Gaussian data: the identities that every formula of `flow` must satisfy, in float64."""

from __future__ import annotations

import pytest
import torch

from anyflow_train.flow.derivative import central_difference, exact_derivative
from anyflow_train.flow.path import expand_time
from tests.flow.oracles import NO_TEXT, GaussianData, TwoModes

DATA = GaussianData(mean=0.7, std=0.5)


def points(batch: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (B, 4), and times 0.1 <= r < t <= 0.9."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, generator=generator, dtype=torch.float64)
    r = 0.1 + 0.3 * torch.rand(batch, generator=generator, dtype=torch.float64)
    return x, r + 0.1 + 0.4 * torch.rand(batch, generator=generator, dtype=torch.float64), r


def test_average_velocity_is_the_velocity_at_r_equal_t_and_moves_along_the_map() -> None:
    x, t, r = points()
    # The closed form is regular at r = t, so only rounding remains.
    torch.testing.assert_close(DATA.average_velocity(x, t, t), DATA.velocity(x, t), rtol=0, atol=1e-14)
    moved = x - expand_time(t - r, x) * DATA.average_velocity(x, t, r)
    torch.testing.assert_close(moved, DATA.map(x, t, r), rtol=0, atol=1e-14)


def test_one_jump_from_noise_gives_the_data() -> None:
    x, t, _ = points()
    assert torch.allclose(DATA.map(x, torch.ones_like(t), torch.zeros_like(t)), 0.7 + 0.5 * x, rtol=0, atol=1e-14)


def test_semigroup() -> None:
    x, t, r = points()
    between = (t + r) / 2
    through = DATA.map(DATA.map(x, t, between), between, r)
    assert (through - DATA.map(x, t, r)).abs().max() < 1e-12


def test_two_mode_toy_solves_its_ode() -> None:
    data = TwoModes(share=0.3, first=-1.0, second=1.0, std=0.3)
    x, t, r = points()
    fine = TwoModes(share=0.3, first=-1.0, second=1.0, std=0.3, steps=96).average_velocity(x, t, r)
    # RK4 at 12 steps against 96: 1e-5, a thousandth of the Monte-Carlo errors that it is used with.
    torch.testing.assert_close(data.average_velocity(x, t, r), fine, rtol=0, atol=5e-5)
    torch.testing.assert_close(data.average_velocity(x, t, t), data.velocity(x, t))


@pytest.mark.parametrize("derivative", ["exact", "difference"])
def test_average_velocity_identity(derivative: str) -> None:
    x, t, r = points()
    v = DATA.velocity(x, t)
    if derivative == "exact":
        total, tolerance = exact_derivative(DATA.average_velocity, x, t, r, NO_TEXT, v), 1e-13
    else:
        total = central_difference(DATA.average_velocity, x, t, r, NO_TEXT, v, 1e-4, "clamped")
        tolerance = 1e-6  # O(epsilon^2) = 1e-8 times third derivatives of order 10
    right = v - expand_time(t - r, x) * total
    torch.testing.assert_close(DATA.average_velocity(x, t, r), right, rtol=0, atol=tolerance)
