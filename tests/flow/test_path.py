"""The linear path."""

from __future__ import annotations

import torch

from anyflow_train.flow.path import at_least_float32, expand_time, interpolate, path_velocity


def test_path_runs_from_data_to_noise_at_constant_velocity() -> None:
    x0, z = torch.randn(2, 3, 4, 5, 6).double(), torch.randn(2, 3, 4, 5, 6).double()
    assert torch.equal(interpolate(x0, z, torch.zeros(2).double()), x0)
    assert torch.equal(interpolate(x0, z, torch.ones(2).double()), z)
    a, b = torch.tensor([0.2, 0.7]).double(), torch.tensor([0.9, 0.8]).double()
    moved = interpolate(x0, z, a) + expand_time(b - a, x0) * path_velocity(x0, z)
    torch.testing.assert_close(moved, interpolate(x0, z, b), rtol=0, atol=1e-14)


def test_times_may_differ_between_frames() -> None:
    x0, z = torch.zeros(2, 3, 4, 5, 6), torch.ones(2, 3, 4, 5, 6)
    t = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.5, 0.75]])
    assert torch.equal(interpolate(x0, z, t)[:, :, 0, 0, 0], t)


def test_arithmetic_is_float32_at_least() -> None:
    dtypes = [at_least_float32(torch.zeros(1, dtype=d)).dtype for d in (torch.bfloat16, torch.float32, torch.float64)]
    assert dtypes == [torch.float32, torch.float32, torch.float64]
