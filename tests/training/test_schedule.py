"""The learning rate against hand-computed values."""

from __future__ import annotations

import pytest

from anyflow_train.config.run import Optimizer
from anyflow_train.training.schedule import learning_rate


def test_warm_up_rises_in_equal_steps_then_stays() -> None:
    config = Optimizer(lr=0.4, warmup_steps=4)
    rates = [learning_rate(step, 100, config) for step in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_no_warm_up_starts_at_the_full_rate() -> None:
    assert learning_rate(0, 10, Optimizer(lr=0.4, warmup_steps=0)) == 0.4


def test_cosine_starts_after_the_warm_up_and_ends_at_its_share() -> None:
    config = Optimizer(lr=1.0, warmup_steps=10, schedule="cosine", final_lr_share=0.2)
    assert learning_rate(10, 110, config) == 1.0
    assert learning_rate(60, 110, config) == pytest.approx(0.6)  # half way: the mean of 1 and 0.2
    assert learning_rate(110, 110, config) == pytest.approx(0.2)
    assert learning_rate(500, 110, config) == pytest.approx(0.2)
