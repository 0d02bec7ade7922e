"""Rebalancing per sample."""

from __future__ import annotations

import pytest
import torch

from anyflow_train.objectives.rebalance import Rebalance, balance_value, rebalanced
from anyflow_train.objectives.types import Loss

BRANCH = torch.tensor([0, 0, 1, 2])
WEIGHT = torch.tensor([0.5, 2.0, 0.25, 1.5], dtype=torch.float64)


def loss() -> tuple[Loss, torch.Tensor]:
    values = torch.tensor([1.0, 3.0, 8.0, 0.1], dtype=torch.float64, requires_grad=True)
    return Loss(values * 1.0, WEIGHT, BRANCH, {}), values


@pytest.mark.parametrize(
    ("mode", "balance", "final"),
    [
        ("weighted", [0.5, 6.0, 2.0, 0.15], [0.5, 6.0, 3.25, 3.25]),
        ("unweighted", [1.0, 3.0, 8.0, 0.1], [0.5, 6.0, 0.5, 3.0]),
        ("none", [0.5, 6.0, 2.0, 0.15], [0.5, 6.0, 2.0, 0.15]),
    ],
)
def test_samples_with_r_below_t_count_as_the_diffusion_mean(
    mode: Rebalance, balance: list[float], final: list[float]
) -> None:
    losses, values = loss()
    value = balance_value(losses, mode)
    assert value.tolist() == pytest.approx(balance)
    result = rebalanced(losses, value[:2].mean(), mode)
    # The floor of 1e-5 in the scale is 1e-4 of the smallest loss.
    assert result.tolist() == pytest.approx(final, rel=2e-4)
    assert not value.requires_grad
    (gradient,) = torch.autograd.grad(result.sum(), values)
    # The scale is detached, so the gradient is the final loss divided by the original one.
    assert gradient.tolist() == pytest.approx(
        [f / v for f, v in zip(final, [1.0, 3.0, 8.0, 0.1], strict=True)], rel=2e-4
    )


def test_samples_with_r_below_t_are_learned_where_all_diffusion_is() -> None:
    losses, values = loss()
    result = rebalanced(losses, torch.tensor(0.0), "weighted", smallest_mean=0.1)
    assert result[2:].tolist() == pytest.approx([0.1, 0.1], rel=1e-4)
    result.sum().backward()
    assert values.grad is not None
    assert (values.grad[2:] > 0).all()
    assert rebalanced(losses, torch.tensor(0.2), "weighted", smallest_mean=0.1)[2].item() == pytest.approx(
        0.2, rel=1e-4
    )


def test_a_learned_sample_does_not_blow_up() -> None:
    losses = Loss(torch.zeros(2, requires_grad=True) * 1.0, torch.ones(2), torch.tensor([0, 2]), {})
    assert rebalanced(losses, torch.tensor(1.0), "weighted").tolist() == [0, 0]


def test_the_square_root_lies_between_full_rebalancing_and_none() -> None:
    """It scales the unweighted loss l to sqrt(mean l), and applies the weight afterwards."""
    loss = Loss(torch.tensor([0.3, 4.0]), torch.tensor([1.0, 0.5]), torch.tensor([0, 2]), {})
    assert balance_value(loss, "sqrt").tolist() == balance_value(loss, "unweighted").tolist()
    found = rebalanced(loss, torch.tensor(0.09), "sqrt")
    torch.testing.assert_close(found, torch.tensor([0.3, 0.5 * (0.09 * 4.0) ** 0.5]), rtol=1e-5, atol=0)
    floored = rebalanced(loss, torch.tensor(0.0), "sqrt", smallest_mean=0.16)
    torch.testing.assert_close(floored, torch.tensor([0.3, 0.5 * (0.16 * 4.0) ** 0.5]), rtol=1e-5, atol=0)
