"""Calls of rollouts, counted from the config, against the rollouts themselves."""

from __future__ import annotations

from statistics import fmean

import pytest
import torch
from torch import Tensor

from anyflow_train.config.compose import compose
from anyflow_train.config.derived import derive, table
from anyflow_train.config.on_policy import DistributionMatching, FakeScore
from anyflow_train.config.rollouts import rollout_calls, student_turns
from anyflow_train.flow.rollout import FirstJump, rollout
from anyflow_train.flow.types import Condition
from tests.flow.oracles import NO_TEXT


def calls_of(steps: int, index: int, first_jump: FirstJump) -> tuple[int, int]:
    """All network calls of a rollout, and those that are made with gradient."""
    slope = torch.ones((), requires_grad=True)
    seen = []

    def student(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return slope * x

    rollout(student, torch.ones(1, 1, 1, 1, 1), NO_TEXT, steps, index, 5.0, first_jump)
    return len(seen), sum(seen)


@pytest.mark.parametrize("first_jump", ["gradient", "detached"])
@pytest.mark.parametrize("steps", [(1, 2), (2,), (3,), (2, 4, 8, 16), (1, 7)])
def test_calls_are_those_of_rollouts(steps: tuple[int, ...], first_jump: FirstJump) -> None:
    """Of all N and g, one N as likely as another."""
    settings = DistributionMatching(
        kind="distribution_matching", steps=steps, first_jump=first_jump, fake_score=FakeScore(init="x")
    )
    made = [[calls_of(number, index, first_jump) for index in range(number)] for number in steps]
    found = rollout_calls(settings)
    assert found.mean == pytest.approx(fmean(fmean(calls for calls, _ in of_steps) for of_steps in made))
    assert found.mean_graphs == pytest.approx(fmean(fmean(graphs for _, graphs in of_steps) for of_steps in made))
    everything = [pair for of_steps in made for pair in of_steps]
    assert (found.fewest, found.most) == (min(everything)[0], max(everything)[0])
    assert found.most_graphs == max(graphs for _, graphs in everything)


@pytest.mark.parametrize(("steps", "updates", "expected"), [(8, 1, 8), (8, 5, 2), (10, 5, 2), (11, 5, 3)])
def test_turns_of_the_student(steps: int, updates: int, expected: int) -> None:
    """The trainer's rule: an update is made in every step that its number divides."""
    settings = DistributionMatching(kind="distribution_matching", fake_score=FakeScore(init="x", updates=updates))
    assert expected == sum(step % updates == 0 for step in range(steps))
    assert student_turns(steps, settings) == expected


def test_what_a_check_says() -> None:
    rows = dict(table(derive(compose("train", ["experiment=wan1_3b_on_policy", "on_policy.fake_score.updates=5"]), 1)))
    assert rows["rollouts"] == "2 to 3 calls of the student, 2.62 on average, 2.62 of them with gradient"
    assert rows["turns"] == "the student's in 240 steps (7,680 samples), the fake score's in all 1,200"
    assert rows["samples seen"] == "38,400"


def test_branches_are_not_named_where_the_objective_is_left_out() -> None:
    config = compose("train", ["experiment=wan1_3b_on_policy", "on_policy.objective_weight=0"])
    assert "branches" not in dict(table(derive(config, 1)))
    assert "rollouts" not in dict(table(derive(compose("train", ["experiment=wan1_3b_forward"]), 1)))
