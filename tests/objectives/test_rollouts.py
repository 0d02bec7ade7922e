"""Rollouts of the student: random numbers, number of calls, gradient, and the buffer."""

from __future__ import annotations

import pytest
import torch

from anyflow_train.flow.draw import Draw
from anyflow_train.flow.rollout import FirstJump, rollout, rollout_jumps
from anyflow_train.objectives.rollouts import Rollout, RolloutBuffer, Rollouts
from tests.flow.oracles import NO_TEXT, GaussianData
from tests.objectives.toys import SHAPE, DoubleDraw, Recorded, draw_of

DATA = GaussianData(mean=0.7, std=0.5)
STEPS = (2, 4, 8, 16, 50)


def rollouts(steps: tuple[int, ...] = STEPS) -> Rollouts:
    return Rollouts(steps, 5.0, "gradient")


def made(positions: tuple[int, ...], step: int) -> tuple[Rollout, Recorded]:
    student = Recorded(DATA.average_velocity)
    return rollouts()(student, NO_TEXT, draw_of(positions, step), SHAPE), student


def test_processes_share_the_sampler_and_nothing_else() -> None:
    seen = set()
    for step in range(60):
        (one, calls), (other, others) = made((0, 1), step), made((2, 3), step)
        assert one.steps == other.steps
        assert [float(t[0]) for _, t, _, _ in calls.calls] == [float(t[0]) for _, t, _, _ in others.calls]
        assert (calls.calls[0][0] - others.calls[0][0]).abs().mean() > 0.5  # other noise
        seen.add((one.steps, len(calls.calls), float(calls.calls[-1][1][0])))
    assert {steps for steps, _, _ in seen} == set(STEPS)
    assert len(seen) > 20  # and with different steps


def test_a_sample_does_not_depend_on_its_micro_batch() -> None:
    whole, part = made((0, 1, 2, 3), 7)[0].x, made((2, 3), 7)[0].x
    assert torch.equal(whole[2:], part)


def test_two_or_three_calls_without_an_empty_jump() -> None:
    for step in range(60):
        result, student = made((0,), step)
        assert len(student.calls) in (2, 3)
        assert all((t > r).all() for _, t, r, _ in student.calls)
        assert student.calls[0][1].item() == 1
        assert student.calls[-1][2].item() == 0
        jumps = [(t.item(), r.item()) for _, t, r, _ in student.calls]
        assert jumps in [list(rollout_jumps(result.steps, index, 5.0)) for index in range(result.steps)]
    single = Recorded(DATA.average_velocity)
    rollouts((1,))(single, NO_TEXT, draw_of((0,)), SHAPE)
    assert len(single.calls) == 1


def test_the_oracle_rolls_out_to_data_whatever_is_drawn() -> None:
    for step in range(10):
        result, student = made((0, 1), step)
        # the oracle's own rounding in float64
        torch.testing.assert_close(result.x, DATA.mean + DATA.std * student.calls[0][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("first_jump", ["gradient", "detached"])
def test_the_gradient_goes_through_the_jumps_that_are_asked_for(first_jump: FirstJump, steps: int) -> None:
    """`u = a x`: X = prod(1 - a d_i) z, so d log X / d a = -sum d_i / (1 - a d_i) over the jumps that have one."""
    z = draw_of((0, 1)).normal("z", SHAPE)
    for index in range(steps):
        a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        x = rollout(lambda x, t, r, condition, a=a: a * x, z, NO_TEXT, steps, index, 5.0, first_jump)
        (gradient,) = torch.autograd.grad(x.sum(), a)
        jumps = rollout_jumps(steps, index, 5.0)
        counted = jumps[1:] if first_jump == "detached" and index > 0 else jumps  # index 0 has no first jump
        slope = -sum((t - r) / (1 - 0.3 * (t - r)) for t, r in counted)
        torch.testing.assert_close(gradient, x.detach().sum() * slope, rtol=1e-9, atol=1e-9)


def test_the_choice_of_jumps_reaches_the_rollout() -> None:
    a = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    slopes = []
    for first_jump in ("gradient", "detached"):
        make = Rollouts((50,), 5.0, first_jump)
        x = make(lambda x, t, r, condition: a * x, NO_TEXT, draw_of((0, 1)), SHAPE).x
        slopes.append(torch.autograd.grad(x.sum(), a)[0] / x.sum().detach())
    assert slopes[0] < slopes[1] < 0


def test_endpoints_are_those_of_this_step_and_used_once() -> None:
    endpoints = RolloutBuffer()
    x = torch.ones(1, *SHAPE, requires_grad=True) * 2
    endpoints.put(draw_of((0,), step=4), 0, Rollout(x, 8))
    assert endpoints.pop(draw_of((0,), step=5), 0) is None
    assert endpoints.pop(draw_of((1,), step=4), 0) is None
    assert endpoints.pop(draw_of((0,), step=4), 1) is None
    kept = endpoints.pop(DoubleDraw(5, 4, (0,), torch.device("cpu"), "another user: "), 0)
    assert kept is not None
    assert torch.equal(kept.x, x)
    assert not kept.x.requires_grad
    assert endpoints.pop(draw_of((0,), step=4), 0) is None


def test_shared_numbers_and_scopes() -> None:
    draw, device = draw_of((0, 1)), torch.device("cpu")
    assert draw.shared("a", 2) == Draw(5, 3, (9,), device).shared("a", 2)
    assert draw.shared("a", 2) != draw.shared("b", 2)
    assert draw.shared("a", 2) != draw_of((0, 1), step=4).shared("a", 2)
    assert draw.shared("a", 2) != draw.scoped("other").shared("a", 2)
    assert not torch.equal(draw.normal("a", (3,)), draw.scoped("other").normal("a", (3,)))
    assert draw.scoped("x").scoped("y").scope == "x: y: "
