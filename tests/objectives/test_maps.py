"""Each objective at exact flow maps of Gaussian data and of a guided ODE, and at maps that are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_train.config.objectives import (
    AverageVelocity,
    FlowMap,
    Lagrangian,
    Mixed,
    MixShares,
    MixWeights,
    Semigroup,
)
from anyflow_train.config.own import objective_class
from anyflow_train.config.positions import branch_counts, local_positions
from anyflow_train.data.batch import Batch
from anyflow_train.flow.path import expand_time
from anyflow_train.flow.times import draw_interval
from anyflow_train.flow.types import Condition
from anyflow_train.flow.types import FlowMap as Map
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.guidance import Noised
from anyflow_train.objectives.lagrangian import LagrangianObjective
from anyflow_train.objectives.mixed import MixedObjective
from anyflow_train.objectives.semigroup import SemigroupObjective
from anyflow_train.objectives.source import draw_points
from anyflow_train.objectives.types import Branch, Objective, Roles, Setting
from tests.flow.oracles import GaussianData, GuidedGaussians, bulk_draw
from tests.objectives.toys import SHAPE as TOY
from tests.objectives.toys import Recorded, SmallNetwork, batch_of, draw_of

DATA, OTHER = GaussianData(0.7, 0.5), GaussianData(0.4, 0.8)
GUIDED = GuidedGaussians(GaussianData(1.0, 0.5), GaussianData(0.0, 1.2), 3.0)
SAMPLES = 400
SHAPE = (1, 1, 1, 4)
THIRDS = MixShares(flow_map=1 / 3, lagrangian=1 / 3, semigroup=1 / 3)
UNIFORM: dict[str, Any] = {"weight": "uniform"}
EXACT: dict[str, Any] = {"velocity": "teacher", "derivative": "jvp"}
OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "flow_map": lambda setting, **keys: FlowMapObjective.build(FlowMap(**UNIFORM | EXACT | keys), setting),
    "lagrangian": lambda setting, **keys: LagrangianObjective.build(Lagrangian(**EXACT | keys), setting),
    "semigroup": lambda setting, **keys: SemigroupObjective.build(Semigroup(**keys), setting),
    "mixed": lambda setting, **keys: MixedObjective.build(Mixed(shares=THIRDS, **EXACT | keys), setting),
}


@dataclass(frozen=True)
class Gradient:
    """Gradient of the loss with respect to u, (B, elements), and the branch and times of each sample."""

    values: Tensor
    branch: Tensor
    t: Tensor
    r: Tensor

    def largest(self, *branches: Branch) -> float:
        rows = torch.stack([self.branch == branch for branch in branches]).any(dim=0)
        return self.values[rows].abs().max().item()


def teacher(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    """Velocity of the data of GUIDED with text 1, and of its negative prompt with text 0."""
    given = expand_time(condition.text[:, 0, 0] == 1, x)
    return torch.where(given, GUIDED.given.velocity(x, t), GUIDED.negative.velocity(x, t))


def guided_map(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    """Flow map of the guided teacher with text 1. Without text it is that of the negative prompt, not guided."""
    given = expand_time(condition.text[:, 0, 0] == 1, x)
    return torch.where(given, GUIDED.average_velocity(x, t, r), GUIDED.negative.average_velocity(x, t, r))


def gradient(kind: str, flow_map: Map, frozen: Map, guided: bool = False, **keys: Any) -> Gradient:
    """Gradient of an objective's loss at `flow_map`, with the velocity `frozen` of the teacher."""
    draw = bulk_draw(SAMPLES, 3)
    latents = 0.7 + 0.5 * torch.randn(SAMPLES, *SHAPE, generator=draw.generator, dtype=torch.float64)
    text = Condition(torch.ones(SAMPLES, 1, 1, dtype=torch.float64))
    batch = Batch(latents, text, Condition(0 * text.text[:1]), ("",) * SAMPLES, draw.positions)
    free = torch.zeros(SAMPLES, *SHAPE, dtype=torch.float64, requires_grad=True)
    guidance: dict[str, Any] = {"guidance": "target", "guidance_scale": GUIDED.scale} if guided else {}
    objective = OBJECTIVES[kind](Setting(SAMPLES), text_dropout=0.4 if guided else 0.0, **guidance, **keys)
    seen = Recorded(lambda x, t, r, condition: flow_map(x, t, r, condition) + free)
    loss = objective(Roles(seen, flow_map, frozen), batch, draw)
    (loss.per_sample * loss.weight).sum().backward()
    assert free.grad is not None
    assert loss.branch is not None
    return Gradient(free.grad.flatten(1), loss.branch, *seen.calls[-1][1:3])


def of(data: GaussianData) -> Map:
    return lambda x, t, r, condition: data.velocity(x, t)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_gradient_vanishes_at_the_exact_flow_map(kind: str) -> None:
    assert gradient(kind, DATA.average_velocity, of(DATA)).largest(*Branch) < 1e-10


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_gradient_vanishes_at_the_flow_map_of_the_guided_ode(kind: str) -> None:
    assert gradient(kind, guided_map, teacher, guided=True).largest(*Branch) < 1e-10


@pytest.mark.parametrize("kind", ["lagrangian", "semigroup"])
def test_without_a_teacher_jumps_vanish_there_too(kind: str) -> None:
    """The velocity at the end of a jump is then the student's own; at r = t it is that of a pair of data and noise."""
    found = gradient(kind, DATA.average_velocity, of(OTHER), velocity="data")
    assert found.largest(Branch.CONSISTENCY, Branch.FREE) < 1e-10
    assert gradient(kind, jumps_no_ode_makes, of(DATA), velocity="data").largest(Branch.CONSISTENCY) > 1e-2


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_gradient_vanishes_at_the_points_of_an_exact_student_too(kind: str, guided: bool) -> None:
    flow_map, velocity = (guided_map, teacher) if guided else (DATA.average_velocity, of(DATA))
    found = gradient(kind, flow_map, velocity, guided, source="student", noise_share=0.3)
    assert found.largest(*Branch) < 1e-10
    assert 0.2 < (found.t == 1).double().mean() < 0.4


def test_points_without_clips_are_noise_and_the_students_own_jumps_from_it_with_each_text() -> None:
    """The student without gradient has the exact map of DATA with text 1, and that of OTHER with text 0."""

    def by_text(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        first = expand_time(condition.text[:, 0, 0] == 1, x)
        return torch.where(first, DATA.average_velocity(x, t, r), OTHER.average_velocity(x, t, r))

    draw, student = bulk_draw(SAMPLES, 3), Recorded(by_text)
    text = (torch.arange(SAMPLES) % 2).double()
    condition = Condition(text.reshape(SAMPLES, 1, 1))
    batch = Batch(torch.zeros(SAMPLES, *SHAPE), condition, condition[:1], ("",) * SAMPLES, draw.positions)
    interval = draw_interval(draw, Setting(SAMPLES).counts, 5.0, "fp32")
    config = Lagrangian(source="student", text_dropout=0.0, noise_share=0.3)
    sample = draw_points(config, Roles(of(DATA), student), batch, draw, interval)
    ((noise, start, end, _),) = student.calls
    moved = sample.t < 1
    assert 0.2 < 1 - moved.double().mean() < 0.4
    assert (start == 1).all()
    assert torch.equal(end, sample.t[moved])
    assert torch.equal(sample.t[moved], interval.t[moved])
    for first, data in ((1, DATA), (0, OTHER)):
        rows = text[moved] == first
        expected = data.map(noise[rows], start[rows], end[rows])
        torch.testing.assert_close(sample.x[moved][rows], expected, rtol=0, atol=1e-12)
    assert sample.x[~moved].std() == pytest.approx(1, abs=0.1)
    assert torch.equal(sample.r == sample.t, interval.branch == Branch.DIFFUSION)


def test_no_gradient_flows_through_points_and_targets() -> None:
    """The network that computes them could give gradients: the test does not detach it."""
    positions = tuple(range(12))
    for config in (Lagrangian(source="student"), Semigroup(source="student"), Mixed(source="student", shares=THIRDS)):
        network, student = SmallNetwork(0), Recorded(SmallNetwork(0))
        loss = built(config)(Roles(student, network, SmallNetwork(2)), batch_of(positions), draw_of(positions))
        loss.per_sample.sum().backward()
        assert all(parameter.grad is None for parameter in network.parameters())


def test_the_intermediate_time_of_the_semigroup_is_uniform_in_the_jump() -> None:
    t = torch.linspace(0.5, 1.0, SAMPLES, dtype=torch.float64)
    r = 0.8 * t
    x = torch.randn(SAMPLES, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    text = Condition(torch.ones(SAMPLES, 1, 1, dtype=torch.float64))
    sample = Noised(x, x, t, r, text, text, (False,) * SAMPLES)
    student = Recorded(DATA.average_velocity)
    objective: Any = OBJECTIVES["semigroup"](Setting(8))
    objective.target(Roles(of(DATA), student), sample, bulk_draw(SAMPLES, 1))
    (_, _, middle, _), (_, start, end, _) = student.calls
    assert torch.equal(start, middle)
    assert torch.equal(end, r)
    shares = ((middle - r) / (t - r)).sort().values
    # Largest distance to the distribution function of uniform numbers; 95 % stay below 1.36 / sqrt(n) = 0.068.
    assert (shares - torch.linspace(0, 1, SAMPLES)).abs().max() < 0.08


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_without_clips_every_kind_of_sample_has_a_gradient(kind: str) -> None:
    """The points are the wrong student's own."""

    def wrong(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return DATA.average_velocity(x, t, r) + 0.1 * expand_time(1 + t - r, x) * x

    found = gradient(kind, wrong, of(DATA), source="student")
    published = gradient(kind, wrong, of(DATA), source="student", weight="beta08")
    assert published.values[found.t == 1].abs().max() == 0  # which is why the config refuses it
    for branch in Branch:
        for at_noise in (True, False):
            rows = (found.branch == branch) & ((found.t == 1) == at_noise)
            assert rows.sum() > 20
            assert found.values[rows].abs().amax(dim=1).min() > 1e-7


def jumps_no_ode_makes(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
    """A map that is right at r = t."""
    return DATA.average_velocity(x, t, r) + 0.1 * expand_time(t - r, x) * x


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_gradient_does_not_vanish_at_a_wrong_map(kind: str) -> None:
    found = gradient(kind, jumps_no_ode_makes, of(DATA))
    assert found.largest(Branch.DIFFUSION) < 1e-10
    for branch in (Branch.CONSISTENCY, Branch.FREE):
        assert found.largest(branch) > 1e-2


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_the_map_of_another_ode_is_found_by_all_samples_or_by_those_with_r_equal_to_t_alone(kind: str) -> None:
    found = gradient(kind, OTHER.average_velocity, of(DATA))
    assert found.largest(Branch.DIFFUSION) > 1e-2
    below = found.largest(Branch.CONSISTENCY, Branch.FREE)
    assert below < 1e-10 if kind == "semigroup" else below > 1e-2


@pytest.mark.parametrize("guided", [False, True])
def test_a_difference_leaves_the_lagrangian_an_error_of_first_order_at_r_0_and_of_second_inside(guided: bool) -> None:
    flow_map, velocity = (guided_map, teacher) if guided else (DATA.average_velocity, of(DATA))
    coarse, fine = (
        gradient("lagrangian", flow_map, velocity, guided, derivative="difference", epsilon=epsilon)
        for epsilon in (0.01, 0.005)
    )
    inside = (fine.branch == Branch.FREE) & (fine.r > 0.01) & (fine.t - fine.r > 0.01)
    for rows, order, most in ((fine.branch == Branch.CONSISTENCY, 1, 0.05), (inside, 2, 1e-3)):
        errors = [found.values[rows].square().mean().sqrt().item() for found in (coarse, fine)]
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)
        assert 0 < errors[1] < most


@pytest.mark.parametrize("kind", ["lagrangian", "semigroup"])
def test_targets_at_the_ends_are_those_of_the_flow_map(kind: str) -> None:
    """At r = 0, at r = t, at t = 1, and at all of them together."""
    t = torch.tensor([0.6, 0.6, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    r = torch.tensor([0.0, 0.6, 0.3, 0.0, 1.0, 0.0], dtype=torch.float64)
    x = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    text = Condition(torch.ones(6, 1, 1, dtype=torch.float64))
    sample = Noised(x, x, t, r, text, text, (False,) * 6)
    objective: Any = OBJECTIVES[kind](Setting(8))
    roles = Roles(DATA.average_velocity, DATA.average_velocity, of(DATA))
    target = objective.target(roles, sample, bulk_draw(6, 1))
    torch.testing.assert_close(target, DATA.average_velocity(x, t, r), rtol=0, atol=1e-12)
    difference: Any = OBJECTIVES[kind](Setting(8), **({"derivative": "difference"} if kind == "lagrangian" else {}))
    pinned = difference.target(roles, sample, bulk_draw(6, 1))[[1, 4, 5]]
    torch.testing.assert_close(pinned, DATA.velocity(x, t)[[1, 4, 5]], rtol=0, atol=1e-12)


CONFIGS: list[AverageVelocity] = [
    Lagrangian(epsilon=0.02),
    Lagrangian(guidance="target", guidance_scale=3.0, text_dropout=0.4),
    Lagrangian(velocity="data", guidance="target", guidance_scale=3.0, text_dropout=0.4),
    Semigroup(),
    Semigroup(guidance="target", guidance_scale=3.0, text_dropout=0.4),
    Semigroup(velocity="data"),
    Lagrangian(source="student", guidance="target", guidance_scale=3.0, text_dropout=0.4),
    Semigroup(source="student"),
    FlowMap(source="student", velocity="teacher", weight="uniform"),
    Mixed(shares=THIRDS, guidance="target", guidance_scale=3.0, text_dropout=0.4),
    Mixed(velocity="data"),
]


def built(config: AverageVelocity, world: int = 1) -> Objective:
    return objective_class(config).build(config, Setting(12, world=world))


@pytest.mark.parametrize("config", CONFIGS)
def test_losses_do_not_depend_on_processes_which_run_equally_many_forwards(config: AverageVelocity) -> None:
    student, average, frozen = SmallNetwork(0), SmallNetwork(1), SmallNetwork(2)
    positions = tuple(range(12))
    whole = built(config)(Roles(student, average, frozen), batch_of(positions), draw_of(positions)).per_sample
    assert whole.isfinite().all()
    for micro_batch, world in ((2, 2), (2, 3), (1, 1), (1, 12), (3, 4), (1, 4), (6, 1)):
        for step in range(12 // (micro_batch * world)):
            calls = set()
            for rank in range(world):
                held = local_positions(12, micro_batch, world, rank)[step]
                roles = [Recorded(network) for network in (student, average, frozen)]
                loss = built(config, world)(Roles(*roles), batch_of(held), draw_of(held)).per_sample
                torch.testing.assert_close(loss, whole[list(held)], rtol=1e-10, atol=1e-13)
                calls.add(tuple(len(role.calls) for role in roles))
            assert len(calls) == 1


def test_only_the_student_gets_gradients_and_the_teacher_of_the_semigroup_is_called_at_r_t_alone() -> None:
    positions = tuple(range(12))
    for config, teacher_rows, derivative_rows in (
        (Lagrangian(), [6, 6], [6, 6]),
        (Semigroup(), [6], [6, 6]),
        (Semigroup(velocity="data"), [], [6, 6]),
        (Lagrangian(velocity="data"), [], [6, 6, 6]),
    ):
        networks = [SmallNetwork(seed) for seed in range(3)]
        roles = [Recorded(network) for network in networks]
        built(config)(Roles(*roles), batch_of(positions), draw_of(positions)).per_sample.sum().backward()
        assert [len(call[0]) for call in roles[0].calls] == [12]
        assert [len(call[0]) for call in roles[1].calls] == derivative_rows
        assert [len(call[0]) for call in roles[2].calls] == teacher_rows
        assert all(p.grad is not None for p in networks[0].parameters())
        assert all(p.grad is None for network in networks[1:] for p in network.parameters())


def test_without_a_teacher_the_misuse_is_named() -> None:
    positions = tuple(range(12))
    network = SmallNetwork()
    for config in (Lagrangian(), Semigroup()):
        with pytest.raises(ValueError, match="needs a teacher"):
            built(config)(Roles(network, network), batch_of(positions), draw_of(positions))
    with pytest.raises(ValueError, match="has the positions"):
        built(Lagrangian())(Roles(network, network, network), batch_of((0,)), replace(draw_of((0,)), positions=(1,)))


def test_points_from_the_student_need_no_clips_but_their_shape() -> None:
    positions, network = tuple(range(12)), SmallNetwork()
    roles, texts = (
        Roles(network, network, network),
        replace(batch_of(positions), latents=torch.full((12, *TOY), torch.nan)),
    )
    config = Lagrangian(source="student")
    loss = built(config)(roles, texts, draw_of(positions)).per_sample
    assert torch.equal(loss, built(config)(roles, batch_of(positions), draw_of(positions)).per_sample)
    with pytest.raises(ValueError, match="need the shape of the latents"):
        built(config)(roles, replace(texts, latents=torch.empty(12, 0)), draw_of(positions))


@pytest.mark.parametrize("shares", [THIRDS, MixShares(), MixShares(flow_map=0.25, lagrangian=0.5, semigroup=0.25)])
def test_a_mix_gives_each_its_share_of_every_branch_equally_on_all_processes(shares: MixShares) -> None:
    counts = branch_counts(96, 0.5, 0.25)
    parts = Mixed(shares=shares).positions(counts)
    assert sorted(position for ranges in parts.values() for part in ranges for position in part) == list(range(48, 96))
    for branch in (Branch.CONSISTENCY, Branch.FREE):
        held = {
            name: sum(counts.branch(p) == branch for part in ranges for p in part) for name, ranges in parts.items()
        }
        assert held == {name: round(24 * share) for name, share in shares if share}
    for micro_batch, world in ((96, 1), (4, 2), (24, 4), (8, 2), (2, 2)):
        for step in range(96 // (micro_batch * world)):
            rows = [local_positions(96, micro_batch, world, rank)[step] for rank in range(world)]
            found = {
                tuple(sum(p in part for p in held for part in ranges) for ranges in parts.values()) for held in rows
            }
            assert len(found) == 1


def test_a_mix_gives_every_sample_the_loss_of_its_objective_with_its_weight() -> None:
    positions, networks = tuple(range(24)), [SmallNetwork(seed) for seed in range(3)]
    setting, batch, draw = Setting(24), batch_of(positions), draw_of(positions)
    weights = MixWeights(flow_map=1.0, lagrangian=2.0, semigroup=0.5)
    guided: dict[str, Any] = {"guidance": "target", "guidance_scale": 3.0, "text_dropout": 0.4}
    mixed = MixedObjective.build(Mixed(shares=THIRDS, weights=weights, **guided), setting)
    loss = mixed(Roles(*networks), batch, draw)
    alone = (FlowMap(velocity="teacher", **guided), Lagrangian(**guided), Semigroup(**guided))
    for part, config in zip(mixed.parts, alone, strict=True):
        single = objective_class(config).build(config, setting)(Roles(*networks), batch, draw)
        rows = [position for position in positions if part.has(position)]
        assert len(rows) == part.size == 4
        torch.testing.assert_close(loss.per_sample[rows], single.per_sample[rows], rtol=1e-10, atol=0)
        torch.testing.assert_close(loss.per_sample[:12], single.per_sample[:12], rtol=1e-10, atol=0)
        assert part.weight == getattr(weights, config.kind)
        assert (loss.weight[rows] == part.weight).all()
        torch.testing.assert_close(loss.metrics[f"loss_{config.kind}"].mean(), loss.per_sample[rows].mean())
    assert (loss.weight[:12] == 1).all()


def test_impossible_mixes_are_named() -> None:
    with pytest.raises(ValueError, match="has 2 consistency samples, too few for the share of lagrangian"):
        Mixed(shares=MixShares(flow_map=0.9, lagrangian=0.1, semigroup=0)).positions(branch_counts(8, 0.5, 0.25))
    half = Mixed(shares=MixShares(semigroup=0.25))
    assert ["add up to 0.75" in finding.text for finding in half.findings()] == [True]
    vain = Mixed(rebalance="weighted", weights=MixWeights(semigroup=2.0))
    assert [finding.keys[0] for finding in vain.findings()] == ["objective.rebalance"]
