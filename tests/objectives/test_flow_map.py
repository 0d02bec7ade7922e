"""Network calls of stage 1, and equal gradients for any number of processes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from anyflow_train.config.objective import Times
from anyflow_train.config.objectives import FlowMap
from anyflow_train.config.positions import branch_counts, local_positions
from anyflow_train.flow.types import Condition
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.rebalance import balance_value, rebalanced
from anyflow_train.objectives.types import Branch, Loss, Roles
from tests.objectives.toys import Recorded, SmallNetwork, batch_of, draw_of, one_network

COUNTS = branch_counts(12, 0.5, 0.25)
PLAIN = FlowMap(kind="flow_map")
PREDICTION = FlowMap(kind="flow_map", guidance="prediction", guidance_scale=3.0, text_dropout=0.4)
TARGET = FlowMap(kind="flow_map", guidance="target", guidance_scale=3.0, text_dropout=0.4)


def micro_losses(objective: FlowMapObjective, roles: Roles, micro_batch: int, world: int) -> list[Loss]:
    """Losses of each process for one step of 12 samples."""
    held = [local_positions(12, micro_batch, world, rank) for rank in range(world)]
    return [objective(roles, batch_of(positions), draw_of(positions)) for positions in itertools.chain(*held)]


def step_gradient(config: FlowMap, micro_batch: int, world: int) -> list[Tensor]:
    """Gradient of a step as in the trainer: the mean over all diffusion samples, then the sum of all losses."""
    network = SmallNetwork()
    losses = micro_losses(FlowMapObjective(config, Times(), COUNTS, world), one_network(network), micro_batch, world)
    total = torch.zeros((), dtype=torch.float64)
    for loss in losses:
        total += balance_value(loss, config.rebalance)[loss.branch == Branch.DIFFUSION].sum()
    mean = total / COUNTS.diffusion
    for loss in losses:
        (rebalanced(loss, mean, config.rebalance).sum() / COUNTS.global_batch).backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("config", [PLAIN, PREDICTION, TARGET], ids=["none", "prediction", "target"])
def test_gradients_do_not_depend_on_processes_and_accumulation(config: FlowMap) -> None:
    whole = step_gradient(config, micro_batch=12, world=1)
    for micro_batch, world in ((2, 2), (2, 3), (1, 1), (1, 12), (3, 4), (1, 4), (6, 1), (2, 6)):
        parts = step_gradient(config, micro_batch, world)
        for part, all_of_it in zip(parts, whole, strict=True):
            torch.testing.assert_close(part, all_of_it, rtol=1e-10, atol=1e-13)  # float64, other order of sums


def test_the_derivative_runs_for_samples_with_r_below_t_only() -> None:
    network = SmallNetwork()
    derivative = Recorded(network)
    objective = FlowMapObjective(PLAIN, Times(), COUNTS, world=1)
    for positions, rows in zip(local_positions(12, 4, 1, 0), (0, 2, 4), strict=True):
        derivative.calls.clear()
        loss = objective(Roles(network, derivative), batch_of(positions), draw_of(positions))
        assert [len(call[0]) for call in derivative.calls] == ([rows, rows] if rows else [])
        assert (loss.branch != Branch.DIFFUSION).sum() == rows


@pytest.mark.parametrize(("micro_batch", "world"), [(1, 12), (3, 4), (2, 2), (1, 4)])
def test_all_processes_run_equally_many_forwards(micro_batch: int, world: int) -> None:
    objective = FlowMapObjective(PREDICTION, Times(), COUNTS, world)
    network = SmallNetwork()
    for step in range(12 // (micro_batch * world)):
        counts = set()
        for rank in range(world):
            positions = local_positions(12, micro_batch, world, rank)[step]
            student, derivative = Recorded(network), Recorded(network)
            objective(Roles(student, derivative), batch_of(positions), draw_of(positions))
            counts.add((len(student.calls), tuple(len(call[0]) for call in derivative.calls)))
        assert len(counts) == 1


def test_a_needless_derivative_changes_nothing() -> None:
    network = SmallNetwork()
    alone = FlowMapObjective(PLAIN, Times(), COUNTS, world=1)(one_network(network), batch_of((3,)), draw_of((3,)))
    spread = FlowMapObjective(PLAIN, Times(), COUNTS, world=12)(one_network(network), batch_of((3,)), draw_of((3,)))
    assert torch.equal(alone.per_sample, spread.per_sample)


@pytest.mark.parametrize("ends", ["clamped", "free"])
def test_a_bfloat16_network_receives_float32_points_and_times(ends: str) -> None:
    network = SmallNetwork().bfloat16()

    def flow_map(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return network(x.bfloat16(), t.bfloat16(), r.bfloat16(), Condition(condition.text.bfloat16())).float()

    seen = Recorded(flow_map)
    positions = tuple(range(12))
    config = PREDICTION.model_copy(update={"derivative_ends": ends})
    for dtype in (torch.bfloat16, torch.float32):
        loss = FlowMapObjective(config, Times(), COUNTS)(
            one_network(seen), batch_of(positions, dtype), draw_of(positions)
        )
        assert loss.per_sample.dtype == loss.weight.dtype == torch.float32
    assert {a.dtype for call in seen.calls for a in call[:3]} == {torch.float32}
    if ends == "clamped":
        assert all(((r <= t) & (t <= 1) & (r >= 0)).all() for _, t, r, _ in seen.calls)


def test_the_derivative_uses_its_own_network_and_only_the_student_gets_gradients() -> None:
    student, ema = SmallNetwork(seed=0), SmallNetwork(seed=1)
    positions = tuple(range(12))
    objective = FlowMapObjective(TARGET, Times(), COUNTS)
    with_ema = objective(Roles(student, ema), batch_of(positions), draw_of(positions)).per_sample
    with_own = objective(Roles(student, student), batch_of(positions), draw_of(positions)).per_sample
    assert torch.equal(with_ema[:6], with_own[:6])
    assert not torch.isclose(with_ema[6:], with_own[6:]).any()
    with_ema.sum().backward()
    assert all(p.grad is None for p in ema.parameters())
    assert all(p.grad is not None for p in student.parameters())


def test_weights_follow_the_option() -> None:
    positions, network = tuple(range(12)), SmallNetwork()
    batch, draw = batch_of(positions), draw_of(positions)
    uniform = PLAIN.model_copy(update={"weight": "uniform"})
    assert (FlowMapObjective(uniform, Times(), COUNTS)(one_network(network), batch, draw).weight == 1).all()
    assert (FlowMapObjective(PLAIN, Times(), COUNTS)(one_network(network), batch, draw).weight != 1).all()


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"times\.distribution must be .uniform."):
        FlowMapObjective(PLAIN, Times(distribution="logit_normal"), COUNTS)
    teacher = PLAIN.model_copy(update={"velocity": "teacher"})
    with pytest.raises(ValueError, match="needs a teacher"):
        FlowMapObjective(teacher, Times(), COUNTS)(one_network(SmallNetwork()), batch_of((0,)), draw_of((0,)))
    with pytest.raises(ValueError, match="has the positions"):
        FlowMapObjective(PLAIN, Times(), COUNTS)(one_network(SmallNetwork()), batch_of((0,)), draw_of((1,)))
