"""The report on derivatives, for cases with known errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from anyflow_train.flow.path import expand_time
from anyflow_train.flow.types import Condition
from anyflow_train.objectives.diagnose import derivative_errors, derivative_table
from tests.objectives.toys import SmallNetwork, batch_of, draw_of

SAMPLES = [(batch_of(positions), draw_of(positions)) for positions in ((0, 1, 2, 3), (4, 5, 6, 7))]


def test_a_sine_in_time_loses_what_the_low_pass_says() -> None:
    def sine(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return (300 * expand_time(t, x)).sin() + 0 * x

    def twice(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return 2 * sine(x, t, r, condition)

    rows = derivative_errors(sine, {"fp32": sine, "twice": twice}, SAMPLES, (0.001, 0.005), shift=5.0, ends="free")
    assert [(row.network, row.epsilon) for row in rows] == [
        ("fp32", 0.001),
        ("fp32", 0.005),
        ("twice", 0.001),
        ("twice", 0.005),
    ]
    for row in rows:
        kept = math.sin(300 * row.epsilon) / (300 * row.epsilon)
        gain = 2 if row.network == "twice" else 1
        assert row.to_exact == pytest.approx(abs(gain * kept - 1), abs=1e-9)
        assert row.to_difference == pytest.approx(gain - 1, abs=1e-12)


def test_a_bfloat16_network_is_further_off_the_smaller_epsilon_is() -> None:
    network, rounded = SmallNetwork(), SmallNetwork().bfloat16()

    def bf16(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return rounded(x.bfloat16(), t.bfloat16(), r.bfloat16(), Condition(condition.text.bfloat16())).double()

    rows = derivative_errors(network, {"fp32": network, "bf16": bf16}, SAMPLES, (0.02, 0.005), shift=5.0)
    clean, noisy = rows[:2], rows[2:]
    assert [row.to_difference for row in clean] == [0, 0]
    assert clean[1].to_exact < clean[0].to_exact < 0.1
    assert noisy[1].to_difference > 2 * noisy[0].to_difference > 0.1
    table = derivative_table(rows)
    assert len(table.splitlines()) == 5
    assert "bf16" in table


def test_no_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        derivative_errors(SmallNetwork(), {}, [], (0.005,), 5.0)
    assert torch.is_grad_enabled()
