"""Samplers and rollouts of closed-form flow maps, in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from anyflow_train.flow.rollout import rollout, rollout_jumps
from anyflow_train.flow.sampler import guided, sample, sample_euler
from anyflow_train.flow.types import Condition
from tests.flow.oracles import NO_TEXT, GaussianData

DATA = GaussianData(mean=0.7, std=0.5)
SHIFT = 5.0
STEPS = (1, 2, 4, 8, 16, 50)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Counted:
    """A flow map `u = a x` that counts its calls."""

    def __init__(self, slope: Tensor) -> None:
        self.slope, self.calls = slope, 0

    def __call__(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        self.calls += 1
        return self.slope * x


@pytest.mark.parametrize("steps", STEPS)
def test_oracle_gives_the_same_data_at_any_number_of_steps(steps: int) -> None:
    z = noise(5, 2)
    # 50 jumps of a contraction, so only rounding remains.
    torch.testing.assert_close(
        sample(DATA.average_velocity, z, NO_TEXT, steps, SHIFT), 0.7 + 0.5 * z, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("steps", STEPS)
def test_oracle_gives_the_same_data_for_every_rollout(steps: int) -> None:
    z = noise(5, 2)
    for index in range(steps):
        x = rollout(DATA.average_velocity, z, NO_TEXT, steps, index, SHIFT)
        torch.testing.assert_close(x, 0.7 + 0.5 * z, rtol=0, atol=1e-12)


def test_euler_is_the_same_sampler_at_r_equal_t_and_converges_at_first_order() -> None:
    z = noise(5, 2)
    errors = [
        (sample_euler(DATA.average_velocity, z, NO_TEXT, steps, 1.0) - (0.7 + 0.5 * z)).norm().item()
        for steps in (64, 128, 256)
    ]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.05)  # the next order is 1/64 relative


@pytest.mark.parametrize("steps", STEPS)
def test_rollout_of_a_linear_map_and_its_gradient_have_closed_forms(steps: int) -> None:
    z = noise(4, 3)
    for index in range(steps):
        jumps = rollout_jumps(steps, index, SHIFT)
        slope = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        linear = Counted(slope)
        x = rollout(linear, z, NO_TEXT, steps, index, SHIFT)
        lengths = [t - r for t, r in jumps]
        factors = [1 - 0.3 * d for d in lengths]
        product = torch.tensor(factors, dtype=torch.float64).prod()
        torch.testing.assert_close(x, product * z, rtol=1e-13, atol=0)
        (gradient,) = torch.autograd.grad(x.sum(), slope)
        closed = sum(-d * product / f for d, f in zip(lengths, factors, strict=True)) * z.sum()
        torch.testing.assert_close(gradient, closed, rtol=1e-12, atol=0)
        assert sum(lengths) == pytest.approx(1, abs=1e-15)
        expected = 3 - (index == 0) - (index == steps - 1)
        assert linear.calls == len(jumps) == expected
        assert steps == 1 or linear.calls in (2, 3)


def test_a_rollout_passes_through_the_sampler_s_times() -> None:
    assert rollout_jumps(4, 1, 1.0) == ((1.0, 0.75), (0.75, 0.5), (0.5, 0.0))
    for steps, index in ((4, 4), (4, -1)):
        with pytest.raises(ValueError, match="has the steps 0 to"):
            rollout_jumps(steps, index, 1.0)


def test_sampling_keeps_no_graph_and_calls_the_network_once_a_step() -> None:
    linear = Counted(torch.tensor(0.3, requires_grad=True))
    assert not sample(linear, torch.randn(2, 2), NO_TEXT, 8, SHIFT).requires_grad
    assert linear.calls == 8


def test_network_receives_times_in_the_dtype_of_the_latents() -> None:
    seen: list[tuple[torch.dtype, torch.Size]] = []

    def flow_map(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        seen.extend([(t.dtype, t.shape), (r.dtype, r.shape)])
        return torch.zeros_like(x)

    sample(flow_map, torch.randn(3, 2), NO_TEXT, 1, SHIFT)
    assert seen == [(torch.float32, torch.Size([3]))] * 2


def by_text(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    """A constant velocity that depends on the text."""
    return condition.text[:, 0, 0][:, None].expand_as(x)


def test_guidance_scale_is_the_cfg_scale() -> None:
    condition = Condition(torch.tensor([[[2.0]], [[3.0]]]))
    negative = Condition(torch.full((1, 1, 1), 1.0))
    x, t = torch.zeros(2, 4), torch.ones(2)
    for scale in (0.0, 0.5, 1.0, 3.0, 4.0):
        u = guided(by_text, negative, scale)(x, t, t, condition)
        expected = 1.0 + scale * torch.tensor([[1.0], [2.0]]).expand(2, 4)
        torch.testing.assert_close(u, expected)
    assert guided(by_text, negative, 1.0) is by_text
