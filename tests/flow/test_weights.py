"""Loss weights as a function of time."""

from __future__ import annotations

import pytest
import torch

from anyflow_train.flow.times import sampling_grid
from anyflow_train.flow.weights import beta08, uniform


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_beta08_has_mean_one_over_the_shifted_grid_and_its_shape(shift: float) -> None:
    grid = torch.tensor(sampling_grid(1000, shift)[:-1], dtype=torch.float64)
    weight = beta08(grid, shift)
    assert weight.mean().item() == pytest.approx(1, abs=1e-12)
    torch.testing.assert_close(weight / weight[500], grid * (1 - grid).sqrt() / (grid[500] * (1 - grid[500]).sqrt()))
    assert weight[0] == 0
    assert weight.argmax() == (grid - 2 / 3).abs().argmin()


def test_beta08_mean_without_shift_is_the_integral() -> None:
    # int t (1-t)^0.5 dt = B(2, 1.5) = 4/15; the grid mean is within its O(1/1000) of that.
    peak = torch.tensor(2 / 3, dtype=torch.float64)
    assert beta08(peak, 1.0).item() == pytest.approx((2 / 3) * (1 / 3) ** 0.5 * 15 / 4, rel=1e-3)


def test_weights_keep_dtype() -> None:
    t = torch.rand(5)
    assert beta08(t, 5.0).dtype == torch.float32
    assert torch.equal(uniform(t), torch.ones(5))
