"""The central difference against closed forms and the exact derivative."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from anyflow_train.flow.derivative import (
    Ends,
    central_difference,
    exact_derivative,
    exact_target_derivative,
    target_secant,
)
from anyflow_train.flow.path import expand_time
from anyflow_train.flow.types import Condition
from tests.flow.oracles import NO_TEXT, GaussianData

DATA = GaussianData(mean=0.7, std=0.5)


def line(batch: int, t: float, r: float) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, 3) in float64 and constant times."""
    x = torch.randn(batch, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.full((batch,), t, dtype=torch.float64), torch.full((batch,), r, dtype=torch.float64)


def affine(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    return 2 * x - 3 * expand_time(t, x) + 5 * expand_time(r, x) + 1


def curved(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    return expand_time(t, x) ** 2 + 0 * x


@pytest.mark.parametrize("ends", ["clamped", "free"])
def test_error_falls_four_times_when_epsilon_halves(ends: Ends) -> None:
    x, t, r = line(5, 0.6, 0.2)
    v = DATA.velocity(x, t)
    exact = exact_derivative(DATA.average_velocity, x, t, r, NO_TEXT, v)
    errors = [
        (central_difference(DATA.average_velocity, x, t, r, NO_TEXT, v, e, ends) - exact).norm().item()
        for e in (0.02, 0.01, 0.005, 0.0025)
    ]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(4, rel=0.01)  # the next order is epsilon^2 ~ 1e-4 relative


@pytest.mark.parametrize("ends", ["clamped", "free"])
@pytest.mark.parametrize("epsilon", [0.1, 0.005])
@pytest.mark.parametrize(("t", "r"), [(0.6, 0.2), (1.0, 0.0), (0.999, 0.997), (0.3, 0.299)])
def test_affine_maps_are_exact_at_any_epsilon(ends: Ends, epsilon: float, t: float, r: float) -> None:
    x, time, target = line(5, t, r)
    tangent = x.flip(0)
    total = central_difference(affine, x, time, target, NO_TEXT, tangent, epsilon, ends)
    # Rounding 1e-16 over the smallest span, 1e-3.
    torch.testing.assert_close(total, 2 * tangent - 3, rtol=0, atol=1e-11)


def test_sine_in_time_is_low_passed() -> None:
    frequency, epsilon = 400.0, 0.005
    x, t, r = line(5, 0.6, 0.2)

    def sine(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return (frequency * expand_time(t, x)).sin() + 0 * x

    total = central_difference(sine, x, t, r, NO_TEXT, torch.zeros_like(x), epsilon, "clamped")
    true = frequency * math.cos(frequency * 0.6)
    phase = frequency * epsilon
    torch.testing.assert_close(total, torch.full_like(x, true * math.sin(phase) / phase), rtol=1e-11, atol=0)


@pytest.mark.parametrize(
    ("t", "r", "expected"),
    [
        (0.6, 0.2, 1.2),  # inside, exact for a parabola
        (0.998, 0.2, 0.998 * 2 - 0.003),  # (1 + 0.993): the mean of both ends
        (1.0, 0.2, 1.995),
        (0.203, 0.2, 0.408),  # (0.208 + 0.2)
        (0.2, 0.2, 0.405),  # one-sided; multiplied by zero in the objective
    ],
)
def test_clamped_ends_divide_by_the_true_span(t: float, r: float, expected: float) -> None:
    x, time, target = line(2, t, r)
    seen: list[tuple[Tensor, Tensor]] = []

    def recorded(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        seen.append((x, t))
        return curved(x, t, r, condition)

    tangent = torch.ones_like(x)
    total = central_difference(recorded, x, time, target, NO_TEXT, tangent, 0.005, "clamped")
    torch.testing.assert_close(total, torch.full_like(x, expected), rtol=0, atol=1e-12)
    for point, at in seen:
        assert r <= at.min() <= at.max() <= 1
        # The points move along the tangent by exactly the change of time.
        torch.testing.assert_close(point - x, expand_time(at - time, x).expand_as(x), rtol=0, atol=1e-15)


def test_no_span_gives_no_derivative() -> None:
    x, t, r = line(2, 1.0, 1.0)
    assert torch.equal(central_difference(affine, x, t, r, NO_TEXT, x, 0.005, "clamped"), torch.zeros_like(x))
    nearly = r - 9e-5
    assert torch.equal(central_difference(affine, x, t, nearly, NO_TEXT, x, 0.005, "clamped"), torch.zeros_like(x))


def test_free_ends_leave_the_interval_as_published() -> None:
    x, t, r = line(2, 0.999, 0.998)
    seen: list[float] = []

    def recorded(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        seen.append(t[0].item())
        return curved(x, t, r, condition)

    total = central_difference(recorded, x, t, r, NO_TEXT, x, 0.005, "free")
    assert seen == pytest.approx([1.004, 0.994], abs=1e-15)
    torch.testing.assert_close(total, torch.full_like(x, 2 * 0.999), rtol=0, atol=1e-12)


def test_a_secant_in_the_target_time_is_exact_at_the_ends_and_of_second_order_inside() -> None:
    """Of x + 2 r + 3 r^2, a line through r - e and r + e is 3 e^2 above u at r, and has the slope of u at r."""

    def parabola(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return x + expand_time(2 * r + 3 * r**2, x)

    x = torch.randn(4, 1, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.9, 0.9, 0.5, 0.0], dtype=torch.float64)
    r = torch.tensor([0.4, 0.0, 0.5, 0.0], dtype=torch.float64)  # inside, r = 0, r = t, no span
    u, slope = target_secant(parabola, x, t, r, NO_TEXT, epsilon=0.1)
    exact, exact_slope = exact_target_derivative(parabola, x, t, r, NO_TEXT)
    torch.testing.assert_close(exact, parabola(x, t, r, NO_TEXT), rtol=0, atol=0)
    errors = [(u - exact).flatten().tolist(), (slope - exact_slope).flatten().tolist()]
    # At an end the difference belongs to the middle of its span, where the slope differs by 6 e / 2.
    assert errors[0] == pytest.approx([0.03, 0, 0, 0], abs=1e-12)
    assert errors[1] == pytest.approx([0, 0.3, -0.3, -2], abs=1e-12)


def test_published_rounding_divides_a_span_of_8_by_10() -> None:
    x, t, r = line(2, 0.8, 0.2)

    def clock(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return expand_time(t, x) + 0 * x

    free = central_difference(clock, x, t, r, NO_TEXT, x, 0.005, "free", precision="bf16")
    torch.testing.assert_close(free, torch.full_like(x, 0.8), rtol=0, atol=1e-12)
    clamped = central_difference(clock, x, t, r, NO_TEXT, x, 0.005, "clamped", precision="bf16")
    torch.testing.assert_close(clamped, torch.ones_like(x), rtol=0, atol=1e-12)


def test_bfloat16_inputs_are_lifted_to_float32_for_points_and_times() -> None:
    dtypes: set[torch.dtype] = set()

    def recorded(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        dtypes.update((x.dtype, t.dtype, r.dtype))
        return affine(x, t, r, condition)

    x, t, r = (a.bfloat16() for a in line(2, 0.5, 0.25))
    assert central_difference(recorded, x, t, r, NO_TEXT, x, 0.005, "clamped").dtype == torch.float32
    assert dtypes == {torch.float32}


def test_times_may_differ_between_frames() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    t = torch.tensor([[0.5, 0.9, 1.0], [0.2, 0.3, 0.4]], dtype=torch.float64)
    total = central_difference(curved, x, t, torch.zeros_like(t), NO_TEXT, x, 0.005, "clamped")
    expected = torch.where(t == 1, 1.995, 2 * t)[..., None].expand_as(x)
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-12)


class Attention(torch.nn.Module):
    """Attention with time features, for which torch would choose fused kernels if they were allowed."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Linear(3, 24)

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        times = torch.stack([t, r], dim=1)[:, None, :].expand(-1, x.shape[1], -1)
        q, k, v = self.features(torch.cat([x[..., None], times], dim=-1)).chunk(3, dim=-1)
        mixed = torch.nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
        return mixed[:, 0].sum(dim=-1)


def test_exact_derivative_runs_through_attention_and_carries_no_graph() -> None:
    torch.manual_seed(0)
    network = Attention().double()
    x, t, r = line(4, 0.6, 0.2)
    exact = exact_derivative(network, x, t, r, NO_TEXT, x.flip(0))
    difference = central_difference(network, x, t, r, NO_TEXT, x.flip(0), 1e-5, "clamped")
    assert not exact.requires_grad
    # epsilon^2 = 1e-10 of curvature, and 1e-16 / 1e-5 of rounding.
    torch.testing.assert_close(difference, exact, rtol=0, atol=1e-8)
    assert exact.abs().max() > 0.01
