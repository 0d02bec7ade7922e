"""Guidance fusion on two Gaussians: only `target` has the flow map of the guided ODE as its fixed point.

Everything is linear in x, so a fixed point is a pair of coefficients u = a x + b over t at r = 0, from a small ODE.
Each objective is stationary at its own fixed point, and not at that of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from anyflow_train.config.objective import Times
from anyflow_train.config.objectives import FlowMap
from anyflow_train.config.positions import BranchCounts
from anyflow_train.data.batch import Batch
from anyflow_train.flow.path import expand_time
from anyflow_train.flow.types import Condition
from anyflow_train.flow.types import FlowMap as FlowMapFunction
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.guidance import Guidance, noised, regression
from anyflow_train.objectives.types import Roles
from tests.flow.oracles import GaussianData, bulk_draw
from tests.objectives.toys import Recorded, SmallNetwork, batch_of, draw_of

GIVEN, NEGATIVE = GaussianData(1.0, 0.5), GaussianData(0.0, 1.2)
SCALE = 3.0
START, NODES = 1e-3, 1500
SAMPLES, ELEMENTS, BINS = 15_000, 4, 4

State = tuple[float, float, float, float]  # a, b of the map without text, a, b of the map with text


def velocity_line(data: GaussianData, t: float) -> tuple[float, float]:
    """Slope and offset of a velocity that is linear in x."""
    slope = (t - (1 - t) * data.std**2) / ((1 - t) ** 2 * data.std**2 + t**2)
    return slope, -data.mean - slope * (1 - t) * data.mean


def slopes(guidance: Guidance, t: float, state: State) -> State:
    """d state / dt at the fixed point, from `D u = (regressed velocity - u) / (t - r)` along the tangent."""
    a_neg, b_neg, a, b = state
    (A_neg, B_neg), (A, B) = velocity_line(NEGATIVE, t), velocity_line(GIVEN, t)
    if guidance == "prediction":
        # Text-dropped samples: D / w makes the approach w times as fast. Tangent: the velocity of the data.
        rate, fused, tangent = SCALE, (a_neg, b_neg), (A, B)
    else:
        rate, fused = 1.0, (A_neg, B_neg)
        tangent = (SCALE * A + (1 - SCALE) * A_neg, SCALE * B + (1 - SCALE) * B_neg)
    goal = (SCALE * A + (1 - SCALE) * fused[0], SCALE * B + (1 - SCALE) * fused[1])
    return (
        rate * (A_neg - a_neg) / t - A_neg * a_neg,
        rate * (B_neg - b_neg) / t - B_neg * a_neg,
        (goal[0] - a) / t - tangent[0] * a,
        (goal[1] - b) / t - tangent[1] * a,
    )


@cache
def fixed_point(guidance: Guidance) -> Tensor:
    """(NODES + 1, 4): the states on an even grid from START to 1, by RK4."""
    (a_neg, b_neg), (a, b) = velocity_line(NEGATIVE, 0.0), velocity_line(GIVEN, 0.0)
    state: State = (a_neg, b_neg, SCALE * a + (1 - SCALE) * a_neg, SCALE * b + (1 - SCALE) * b_neg)
    states, step = [state], (1 - START) / NODES

    def ahead(state: State, slope: State, by: float) -> State:
        return tuple(s + by * k for s, k in zip(state, slope, strict=True))  # pyright: ignore[reportReturnType]

    for i in range(NODES):
        t = START + i * step
        k1 = slopes(guidance, t, state)
        k2 = slopes(guidance, t + step / 2, ahead(state, k1, step / 2))
        k3 = slopes(guidance, t + step / 2, ahead(state, k2, step / 2))
        k4 = slopes(guidance, t + step, ahead(state, k3, step))
        for slope, share in ((k1, 1 / 6), (k2, 1 / 3), (k3, 1 / 3), (k4, 1 / 6)):
            state = ahead(state, slope, step * share)
        states.append(state)
    return torch.tensor(states, dtype=torch.float64)


def linear_map(guidance: Guidance) -> FlowMapFunction:
    """The fixed point as a flow map: r = 0 from the table, r = t from the velocities. Text 0 is the negative prompt."""
    table = fixed_point(guidance)

    def flow_map(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        place = ((t - START) / (1 - START) * NODES).clamp(0, NODES - 1e-9)
        low = place.long()
        row = torch.lerp(table[low], table[low + 1], (place - low)[:, None])
        given = condition.text[:, 0, 0] == 1
        a, b = torch.where(given, row[:, 2], row[:, 0]), torch.where(given, row[:, 3], row[:, 1])
        jump = expand_time(a, x) * x + expand_time(b, x)
        velocity = torch.where(expand_time(given, x), GIVEN.velocity(x, t), NEGATIVE.velocity(x, t))
        return torch.where(expand_time(r == t, x), velocity, jump)

    return flow_map


@dataclass(frozen=True)
class Residuals:
    """Deviations from zero, in standard errors, of the gradient along 1 and along x in some bins of t."""

    deviations: list[float]
    largest_error: float


def residuals(objective: Guidance, at: Guidance, text_dropout: float) -> Residuals:
    """The gradient with respect to free coefficients of u = a x + b, of one objective at one fixed point."""
    data = NEGATIVE if text_dropout == 1 else GIVEN
    draw = bulk_draw(SAMPLES, seed=7)
    shape = (SAMPLES, 1, 1, 1, ELEMENTS)
    generator = torch.Generator().manual_seed(8)
    latents = data.mean + data.std * torch.randn(shape, generator=generator, dtype=torch.float64)
    text = Condition(torch.ones(SAMPLES, 1, 1, dtype=torch.float64))
    negative = Condition(torch.zeros(1, 1, 1, dtype=torch.float64))
    batch = Batch(latents, text, negative, ("",) * SAMPLES, draw.positions)
    fixed = linear_map(at)
    free = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    seen = Recorded(lambda x, t, r, condition: fixed(x, t, r, condition) + (free if torch.is_grad_enabled() else 0))
    config = FlowMap(kind="flow_map", guidance=objective, guidance_scale=SCALE, text_dropout=text_dropout)
    consistency = BranchCounts(diffusion=0, consistency=SAMPLES, free=0)
    loss = FlowMapObjective(config, Times(), consistency)(Roles(seen, fixed), batch, draw)
    loss.per_sample.sum().backward()
    assert free.grad is not None
    x, t = seen.calls[-1][:2]
    deviations, errors = [], []
    for direction in (torch.ones_like(x), x):
        for rows in t.argsort().chunk(BINS):
            values = (free.grad * direction)[rows].flatten() * ELEMENTS / 2
            errors.append((values.std() / len(values) ** 0.5).item())
            deviations.append(values.mean().abs().item() / errors[-1])
    return Residuals(deviations, max(errors))


@pytest.mark.parametrize(
    ("guidance", "mean", "std"),
    [("target", 1.35, 0.087), ("prediction", 2.16, 1.02)],
)
def test_one_step_moments_of_the_fixed_points(guidance: Guidance, mean: float, std: float) -> None:
    _, _, a, b = fixed_point(guidance)[-1].tolist()
    assert -b == pytest.approx(mean, abs=0.005)
    assert abs(1 - a) == pytest.approx(std, abs=0.005)


def test_target_s_fixed_point_is_the_guided_ode() -> None:
    # d ln sigma / dt is the slope of each velocity, so the guided spread is a product of powers.
    assert 1 - fixed_point("target")[-1, 2].item() == pytest.approx(0.5**SCALE * 1.2 ** (1 - SCALE), abs=1e-6)
    a, b = fixed_point("target")[-1, :2].tolist()
    assert (1 - a, -b) == pytest.approx((1.2, 0.0), abs=1e-6)


@pytest.mark.parametrize("guidance", ["target", "prediction"])
@pytest.mark.parametrize("text_dropout", [0.0, 1.0], ids=["with text", "text dropped"])
def test_each_objective_is_stationary_at_its_own_fixed_point_only(guidance: Guidance, text_dropout: float) -> None:
    own = residuals(guidance, guidance, text_dropout)
    assert max(own.deviations) < 4
    assert own.largest_error < 0.02
    other: Guidance = "prediction" if guidance == "target" else "target"
    assert max(residuals(guidance, other, text_dropout).deviations) > 20


def test_target_takes_the_scale_off_text_dropped_samples_and_prediction_does_not() -> None:
    positions = tuple(range(12))
    batch, draw, network = batch_of(positions), draw_of(positions), SmallNetwork()
    t = draw.uniform("t", 1).squeeze(1)
    point = noised(batch, draw, t, t / 2, text_dropout=0.5)
    assert 0 < sum(point.dropped) < 12
    target = regression(Roles(network, network), point, "target", SCALE, "data")
    dropped = torch.tensor(point.dropped)
    assert target.divisor.tolist() == [1 if d else SCALE**2 for d in point.dropped]
    assert torch.equal(target.velocity[dropped], point.velocity[dropped])
    assert target.tangent is target.velocity
    assert torch.equal(point.condition.text[dropped], point.negative.text[dropped])
    assert torch.equal(point.condition.text[~dropped], batch.condition.text[~dropped])
    prediction = regression(Roles(network, network), point, "prediction", SCALE, "data")
    assert (prediction.divisor == SCALE**2).all()
    assert prediction.tangent is point.velocity
    none = regression(Roles(network, network), point, "none", SCALE, "data")
    assert none.velocity is none.tangent is point.velocity
    assert (none.divisor == 1).all()


@pytest.mark.parametrize("guidance", ["target", "prediction"])
def test_no_forward_for_the_negative_prompt_where_the_text_is_the_negative_prompt(guidance: Guidance) -> None:
    positions = tuple(range(12))
    batch, draw, network = batch_of(positions), draw_of(positions), SmallNetwork()
    t = draw.uniform("t", 1).squeeze(1)
    whole = noised(batch, draw, t, t / 2, text_dropout=0.5)
    student = Recorded(network)
    made = regression(Roles(student, student), whole, guidance, SCALE, "data")
    (asked,) = student.calls
    kept = ~torch.tensor(whole.dropped)
    assert torch.equal(asked[0], whole.x[kept])
    # The regression target if the network is called for every sample.
    r = whole.t if guidance == "target" else whole.r
    u, unconditional = network(whole.x, t, whole.r, whole.condition), network(whole.x, t, r, whole.negative)
    scale = SCALE if guidance == "prediction" else expand_time(torch.where(kept, SCALE, 1.0).double(), whole.x)
    error = (u - (unconditional + scale * (whole.velocity - unconditional))).square().flatten(1).mean(dim=1)
    torch.testing.assert_close(made.error(u, made.velocity), error / made.divisor, rtol=1e-12, atol=0)


def test_a_sample_without_text_still_makes_the_call_that_other_processes_make() -> None:
    batch, draw = batch_of((3,)), draw_of((3,))
    t = draw.uniform("t", 1).squeeze(1)
    point = noised(batch, draw, t, t / 2, text_dropout=1.0)
    for guidance in ("target", "prediction"):
        student = Recorded(SmallNetwork())
        regression(Roles(student, student), point, guidance, SCALE, "data")
        assert [len(call[0]) for call in student.calls] == [1]


def test_the_teacher_s_velocity_replaces_the_data_s() -> None:
    positions = tuple(range(12))
    batch, draw = batch_of(positions), draw_of(positions)
    student, teacher = Recorded(SmallNetwork(seed=0)), Recorded(SmallNetwork(seed=1))
    t = draw.uniform("t", 1).squeeze(1)
    point = noised(batch, draw, t, t / 2, text_dropout=0.0)
    given = SmallNetwork(seed=1)(point.x, t, t, point.condition)
    unconditional = SmallNetwork(seed=1)(point.x, t, t, point.negative)
    roles = Roles(student, student, teacher)
    assert torch.equal(regression(roles, point, "none", 1.0, "teacher").velocity, given)
    guided = regression(roles, point, "target", SCALE, "teacher")
    torch.testing.assert_close(guided.velocity, unconditional + SCALE * (given - unconditional))
    assert guided.tangent is guided.velocity
    assert not student.calls  # the guided teacher does not call the student
    assert all(torch.equal(r, t) for _, t, r, _ in teacher.calls)
    fused = regression(roles, point, "prediction", SCALE, "teacher")
    assert torch.equal(fused.tangent, given)
    assert len(student.calls) == 1


def test_scale_one_is_no_guidance() -> None:
    positions = tuple(range(12))
    batch, draw, network = batch_of(positions), draw_of(positions), SmallNetwork()
    counts = BranchCounts(6, 3, 3)
    options: tuple[Guidance, ...] = ("none", "prediction", "target")
    losses = [
        FlowMapObjective(FlowMap(kind="flow_map", guidance=guidance, guidance_scale=1.0), Times(), counts)(
            Roles(network, network), batch, draw
        ).per_sample
        for guidance in options
    ]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(losses[2], losses[0], rtol=1e-12, atol=0)
