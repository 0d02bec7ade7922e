"""Distribution matching and the fake score: closed forms, stationary points, and which roles receive gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from anyflow_train.config.chunks import Chunks
from anyflow_train.config.on_policy import ScoreTimes
from anyflow_train.data.batch import Batch
from anyflow_train.flow.rollout import FirstJump
from anyflow_train.flow.types import Condition, FlowMap
from anyflow_train.models.flow_map import NetworkFlowMap
from anyflow_train.objectives.distribution_matching import (
    DistributionMatchingObjective,
    FakeScoreObjective,
    direction,
    draw_score_time,
)
from anyflow_train.objectives.rollouts import RolloutBuffer, Rollouts
from anyflow_train.objectives.types import Roles
from tests.flow.oracles import NO_TEXT, GaussianData, bulk_draw
from tests.models.networks import FAR, SMALL, small_far
from tests.objectives.toys import SHAPE, Recorded, SmallNetwork, batch_of, draw_of

TIMES = ScoreTimes()
SLOTS = (0, 1, 2)
REAL, FAKE = GaussianData(mean=0.7, std=0.5), GaussianData(mean=-0.2, std=0.8)


def rollouts(steps: tuple[int, ...] = (2, 4, 8)) -> Rollouts:
    return Rollouts(steps, 5.0, "gradient")


def matching(scale: float = 1.0, endpoints: RolloutBuffer | None = None) -> DistributionMatchingObjective:
    return DistributionMatchingObjective(rollouts(), TIMES, scale, endpoints)


def networks() -> tuple[Roles, dict[str, SmallNetwork]]:
    """Student, teacher and fake score with equal shapes and different weights."""
    made = {name: SmallNetwork(seed) for seed, name in enumerate(("student", "teacher", "fake_score"))}
    return Roles(made["student"], made["student"], made["teacher"], made["fake_score"]), made


def test_two_gaussians_in_closed_form() -> None:
    """E[x0 | x_s] of N(m, d^2) is `m + (1 - s) d^2 / ((1 - s)^2 d^2 + s^2) (x_s - (1 - s) m)`."""
    x, draw = batch_of(SLOTS).latents, draw_of(SLOTS)
    found = direction(REAL.average_velocity, FAKE.average_velocity, x, NO_TEXT, draw, TIMES)
    s = draw_score_time(draw, TIMES).reshape(-1, 1, 1, 1, 1)
    x_s = (1 - s) * x + s * draw.normal("score noise", SHAPE)

    def expected(data: GaussianData) -> Tensor:
        gain = (1 - s) * data.std**2 / ((1 - s) ** 2 * data.std**2 + s**2)
        return data.mean + gain * (x_s - (1 - s) * data.mean)

    distance = (x - expected(REAL)).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    # float64 rounding of two equivalent formulas
    torch.testing.assert_close(found.gradient, (expected(FAKE) - expected(REAL)) / distance, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.distance, distance.flatten(), rtol=1e-9, atol=0)


def test_the_gradient_by_the_rollout_is_twice_the_direction_over_the_number_of_elements() -> None:
    """A student `u = theta` that jumps once has x = z - theta, so d loss / d theta is minus that gradient."""
    roles, _ = networks()
    batch, draw = batch_of(SLOTS), draw_of(SLOTS)
    theta = torch.full((len(SLOTS), *SHAPE), 0.4, dtype=torch.float64, requires_grad=True)
    roles = dataclasses.replace(roles, student=lambda x, t, r, condition: theta)
    loss = DistributionMatchingObjective(rollouts((1,)), TIMES, 1.0)(roles, batch, draw)
    loss.per_sample.mean().backward()
    assert roles.teacher is not None
    assert roles.fake_score is not None
    draw = draw.scoped("distribution matching")
    x = draw.normal("noise", SHAPE) - theta.detach()
    found = direction(roles.teacher, roles.fake_score, x, batch.condition, draw, TIMES)
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad, -2 * found.gradient / x.numel(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss.per_sample, found.gradient.square().mean(dim=(1, 2, 3, 4)), rtol=1e-9, atol=0)


def test_equal_scores_leave_the_student_alone() -> None:
    roles, made = networks()
    loss = matching()(dataclasses.replace(roles, fake_score=roles.teacher), batch_of(SLOTS), draw_of(SLOTS))
    loss.per_sample.sum().backward()
    assert loss.per_sample.abs().max() == 0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in made["student"].parameters())
    guided = matching(scale=4.0)(dataclasses.replace(roles, fake_score=roles.teacher), batch_of(SLOTS), draw_of(SLOTS))
    assert guided.per_sample.min() > 0  # the guided teacher differs


def test_the_teacher_is_guided_by_the_usual_scale_and_the_fake_score_is_not() -> None:
    roles, _ = networks()
    assert roles.teacher is not None
    assert roles.fake_score is not None
    teacher, fake = Recorded(roles.teacher), Recorded(roles.fake_score)
    batch = batch_of(SLOTS)
    student = GaussianData(0.1, 0.9).average_velocity
    loss = matching(scale=4.0)(Roles(student, student, teacher, fake), batch, draw_of(SLOTS))
    (x, s, r, negative), (_, _, _, text) = teacher.calls
    assert torch.equal(s, r)
    assert torch.equal(negative.text, batch.negative.text.expand_as(text.text))
    assert torch.equal(text.text, batch.condition.text)
    assert [torch.equal(call[0], x) for call in fake.calls] == [True]
    with torch.no_grad():
        bare, conditional = roles.teacher(x, s, s, negative), roles.teacher(x, s, s, text)
        span = s.reshape(-1, 1, 1, 1, 1)
        real = x - span * (conditional + 3 * (conditional - bare))  # k = 3 is w = 4
        predicted = x - span * roles.fake_score(x, s, s, text)
        made = rollouts()(student, text, draw_of(SLOTS).scoped("distribution matching"), SHAPE)
        distance = (made.x - real).abs().mean(dim=(1, 2, 3, 4))
        wanted = ((predicted - real).square().mean(dim=(1, 2, 3, 4))) / distance.square()
    torch.testing.assert_close(loss.per_sample.detach(), wanted, rtol=1e-9, atol=0)


def test_each_loss_reaches_its_own_network_only() -> None:
    roles, made = networks()
    for objective, trained in ((matching(scale=4.0), "student"), (FakeScoreObjective(rollouts(), TIMES), "fake_score")):
        for network in made.values():
            network.zero_grad()
        objective(roles, batch_of(SLOTS), draw_of(SLOTS)).per_sample.sum().backward()
        reached = {name for name, net in made.items() if any(p.grad is not None for p in net.parameters())}
        assert reached == {trained}


@pytest.mark.parametrize("reuse", [True, False])
def test_the_fake_score_sees_noised_clean_endpoints(reuse: bool) -> None:
    """The fake score sees `(1 - t) x + t z`, where x is the student's rollout or a new one."""
    endpoints = RolloutBuffer() if reuse else None
    student, fake = Recorded(REAL.average_velocity), Recorded(FAKE.average_velocity)
    roles = Roles(student, student, FAKE.average_velocity, fake)
    batch, draw = batch_of(SLOTS), draw_of(SLOTS)
    matching(endpoints=endpoints)(roles, batch, draw)
    used, own = len(student.calls), student.calls[0][0]
    fake.calls.clear()
    loss = FakeScoreObjective(rollouts(), TIMES, endpoints)(roles, batch, draw)
    assert (len(student.calls) == used) == reuse
    start = own if reuse else student.calls[used][0]
    assert torch.equal(start, own) == reuse
    x0 = REAL.mean + REAL.std * start  # the end of every rollout of the oracle
    ((point, t, r, _),) = fake.calls
    z = draw.scoped("fake score").normal("score noise", SHAPE)
    time = t.reshape(-1, 1, 1, 1, 1)
    assert torch.equal(t, r)
    torch.testing.assert_close(point, (1 - time) * x0 + time * z, rtol=0, atol=1e-12)
    wanted = (FAKE.velocity(point, t) - (z - x0)).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(loss.per_sample, wanted, rtol=1e-9, atol=0)


def test_the_fake_score_settles_at_the_velocity_of_the_student_s_samples() -> None:
    """Rollouts of a Gaussian flow map are Gaussian; at that oracle plus `a + b x` the loss has no slope in a or b."""
    count = 20_000
    draw = bulk_draw(count, 0)
    text = torch.zeros(count, 1, 1, dtype=torch.float64)
    batch = Batch(
        torch.zeros(count, 1, 1, 1, 4).double(), Condition(text), Condition(text[:1]), ("",) * count, draw.positions
    )
    slopes = {}
    for name, data in (("own", REAL), ("another", FAKE)):
        a = torch.zeros(count, 1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
        b = torch.zeros(count, 1, 1, 1, 1, dtype=torch.float64, requires_grad=True)

        def fake(x: Tensor, t: Tensor, r: Tensor, condition: Condition, data=data, a=a, b=b) -> Tensor:
            return data.average_velocity(x, t, r) + a + b * x

        student = REAL.average_velocity
        make = Rollouts((2, 4), 5.0, "gradient")
        roles = Roles(student, student, None, fake)
        FakeScoreObjective(make, TIMES)(roles, batch, draw).per_sample.sum().backward()
        slopes[name] = [(g.mean() / (g.std() / count**0.5)).abs().item() for g in (a.grad, b.grad) if g is not None]
    assert max(slopes["own"]) < 4  # standard errors
    assert min(slopes["another"]) > 10


@pytest.mark.parametrize("first_jump", ["gradient", "detached"])
def test_a_backward_pass_per_chunk_gives_the_gradient_of_the_whole_graph(first_jump: FirstJump) -> None:
    """And it never needs more than one chunk's graph: all calls of a chunk go back before those of the next one."""
    chunks = Chunks(FAR["chunk_partition"], FAR["full_chunk_limit"])
    made = Rollouts((4,), 5.0, first_jump, chunks)
    networks = [small_far().double() for _ in range(3)]
    for number, network in enumerate(networks):
        torch.manual_seed(number)
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    student, teacher, fake = (NetworkFlowMap(network, None) for network in networks)
    text = torch.randn(2, 5, SMALL["text_dim"], dtype=torch.float64)
    batch = Batch(torch.zeros(2, 4, 4, 8, 12), Condition(text), Condition(text[:1]), ("a", "b"), SLOTS[:2])
    found = {}
    for backward in ("clip", "chunk"):
        objective = DistributionMatchingObjective(made, TIMES, 2.0, None, backward)
        loss = objective(Roles(student, student, teacher, fake), batch, draw_of(SLOTS[:2]))
        parts = []
        for part in loss.parts():
            part.per_sample.mul(torch.tensor([1.0, 0.5])).sum().backward()
            parts.append(part.per_sample.detach())
        assert len(parts) == (1 if backward == "clip" else len(chunks.partition))
        torch.testing.assert_close(sum(parts), loss.per_sample.detach(), rtol=1e-12, atol=0)
        gradients = {name: parameter.grad for name, parameter in networks[0].named_parameters()}
        networks[0].zero_grad(set_to_none=True)
        found[backward] = loss.per_sample.detach(), gradients
    torch.testing.assert_close(found["chunk"][0], found["clip"][0], rtol=1e-12, atol=0)
    whole, replayed = (found[backward][1] for backward in ("clip", "chunk"))
    assert all(not gradient.equal(torch.zeros_like(gradient)) for gradient in whole.values() if gradient is not None)
    torch.testing.assert_close(replayed, whole, rtol=1e-9, atol=1e-14)


def test_times_stay_in_their_range() -> None:
    positions = tuple(range(400))
    t = draw_score_time(draw_of(positions), ScoreTimes(low=0.1, high=0.9))
    assert t.min() == 0.1
    assert t.max() == 0.9
    free = draw_score_time(draw_of(positions), ScoreTimes(shift=1.0))
    assert 0 < free.min() < 0.02
    assert 0.98 < free.max() < 1


def test_a_rollout_that_the_teacher_predicts_has_a_least_distance() -> None:
    """If `x - real` is 0 up to rounding, the difference of the predictions is divided by 1e-6."""

    def predicts(x0: float) -> FlowMap:
        return lambda x, t, r, condition: (x - x0) / t.reshape(-1, 1, 1, 1, 1)

    x = torch.zeros(3, *SHAPE, dtype=torch.float64)
    found = direction(predicts(0.0), predicts(1.0), x, NO_TEXT, draw_of(SLOTS), ScoreTimes(low=0.1))
    torch.testing.assert_close(found.gradient, torch.full_like(x, 1e6), rtol=1e-9, atol=0)


@pytest.mark.parametrize("missing", ["teacher", "fake_score"])
def test_a_missing_role_is_refused(missing: str) -> None:
    roles, _ = networks()
    with pytest.raises(ValueError, match="fake score"):
        matching()(dataclasses.replace(roles, **{missing: None}), batch_of(SLOTS), draw_of(SLOTS))
    with pytest.raises(ValueError, match="fake score"):
        FakeScoreObjective(rollouts(), TIMES)(
            dataclasses.replace(roles, fake_score=None), batch_of(SLOTS), draw_of(SLOTS)
        )
