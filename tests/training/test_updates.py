"""One update: accumulation, rebalancing across micro-steps, and its report."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from anyflow_train.config.objective import Times
from anyflow_train.config.objectives import FlowMap
from anyflow_train.config.positions import Branch, BranchCounts, local_positions
from anyflow_train.config.run import Ema as EmaConfig
from anyflow_train.config.run import Optimizer
from anyflow_train.data.batch import Batch
from anyflow_train.flow.draw import Draw
from anyflow_train.flow.types import Condition
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.types import Loss, Roles
from anyflow_train.training.ema import Ema
from anyflow_train.training.engine import ReplicatedEngine, adam_steps
from anyflow_train.training.processes.world import World
from anyflow_train.training.step_statistics import DiffusionMean
from anyflow_train.training.updates import Term, Trainable, Update, make_update

CPU = World(torch.device("cpu"))
COUNTS = BranchCounts(3, 2, 3)  # three diffusion slots: with micro-batches of 2 the boundary lies inside of one
SIZE = COUNTS.global_batch
KEYS = tuple(f"sample{i}" for i in range(SIZE))


class Toy(nn.Module):
    """A flow map on (B, 1, 1, 2, 2) latents."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        times = torch.stack([t, r], dim=1)
        return self.layers(torch.cat([x.flatten(1), times], dim=1)).reshape(x.shape)


def batches(micro_batch: int) -> list[Batch]:
    latents = torch.randn(SIZE, 1, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    text = torch.zeros(SIZE, 2, 3)
    return [
        Batch(
            latents[list(positions)],
            Condition(text[list(positions)]),
            Condition(text[:1]),
            tuple(KEYS[position] for position in positions),
            positions,
        )
        for positions in local_positions(SIZE, micro_batch, 1, 0)
    ]


def draws(given: Sequence[Batch]) -> list[Draw]:
    return [Draw(0, 4, batch.positions, CPU.device) for batch in given]


def trainable_of(toy: Toy) -> Trainable:
    parameters = dict(toy.named_parameters())
    ema = Ema(parameters, EmaConfig())
    optimizer = Optimizer(lr=0.1, clip_norm=1e9)
    return Trainable(toy, ReplicatedEngine(CPU, toy, parameters, optimizer), optimizer, ema)


def flow_map_update(rebalance: str) -> Update:
    config = FlowMap.model_validate({"kind": "flow_map", "rebalance": rebalance})
    objective = FlowMapObjective(config, Times(), COUNTS)
    return Update(
        "student", (Term(name="flow_map", objective=objective, rebalance=config.rebalance, diffusion=COUNTS.diffusion),)
    )


def updated(rebalance: str, micro_batch: int) -> tuple[dict[str, float], Tensor]:
    toy, given = Toy(), batches(micro_batch)
    trainable = trainable_of(toy)
    report = make_update(flow_map_update(rebalance), trainable, Roles(toy, toy), given, draws(given), 0.1, "")
    assert report.applied
    first_moments = torch.cat([entry.read().flatten() for entry in trainable.engine.entries("exp_avg").values()])
    return report.values, first_moments / 0.1  # exp_avg after one step is (1 - beta1) times the gradient


@pytest.mark.parametrize("rebalance", ["weighted", "unweighted", "none"])
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_accumulation_changes_neither_loss_nor_gradient(rebalance: str, micro_batch: int) -> None:
    values, gradient = updated(rebalance, SIZE)
    cut_values, cut_gradient = updated(rebalance, micro_batch)
    assert cut_values == pytest.approx(values, rel=1e-5)  # float32 sums in another order
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_the_rebalanced_gradient_is_the_formulas() -> None:
    """Against the whole batch at once: every other sample's loss scaled to the diffusion samples' mean."""
    toy, given = Toy(), batches(SIZE)
    loss = flow_map_update("weighted").terms[0].objective(Roles(toy, toy), given[0], draws(given)[0])
    weighted = loss.per_sample * loss.weight
    mean = weighted[: COUNTS.diffusion].mean().item()
    scales = [1.0] * COUNTS.diffusion + [mean / (v + 1e-5) for v in weighted[COUNTS.diffusion :].tolist()]
    ((weighted * torch.tensor(scales)).sum() / SIZE).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in toy.parameters() if parameter.grad is not None])
    _, gradient = updated("weighted", 2)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_losses_are_reported_by_branch() -> None:
    toy, given = Toy(), batches(SIZE)
    loss = flow_map_update("none").terms[0].objective(Roles(toy, toy), given[0], draws(given)[0])
    values, _ = updated("none", 2)
    for branch in Branch:
        mean = loss.per_sample[loss.branch == branch].mean().item()
        assert values[f"loss_{branch.name.lower()}"] == pytest.approx(mean, rel=1e-5)
    assert values["loss"] == pytest.approx((loss.per_sample * loss.weight).mean().item(), rel=1e-5)


def test_a_poisoned_sample_is_named_and_nothing_changes() -> None:
    toy, given = Toy(), batches(2)
    given[1].latents[1] = 1e30  # finite as data, not as a square
    trainable = trainable_of(toy)
    before = {name: parameter.detach().clone() for name, parameter in toy.named_parameters()}
    report = make_update(flow_map_update("weighted"), trainable, Roles(toy, toy), given, draws(given), 0.1, "")
    assert not report.applied
    assert report.nonfinite_samples == (KEYS[3],)
    assert all(torch.equal(before[name], parameter) for name, parameter in toy.named_parameters())
    assert adam_steps(trainable.engine.optimizer) == 0


def test_a_gradient_alone_that_is_not_finite_names_all_samples() -> None:
    toy, given = Toy(), batches(SIZE)
    toy.layers[2].weight.register_hook(lambda gradient: gradient * float("nan"))
    report = make_update(flow_map_update("none"), trainable_of(toy), Roles(toy, toy), given, draws(given), 0.1, "")
    assert report.nonfinite_samples == KEYS


class OneOf(World):
    """A process of two. The other process's sum is 10."""

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        return values + 10


def test_the_diffusion_mean_is_reduced_once_by_all_processes_in_the_same_micro_step() -> None:
    """Two processes, 3 diffusion slots, micro-batches of 1: the second micro-step, slots 2 and 3, is the boundary."""
    world = OneOf(CPU.device, rank=1, size=2)
    mean = DiffusionMean("weighted", 3, world)

    def loss(value: float, branch: Branch) -> Loss:
        return Loss(torch.tensor([value]), torch.ones(1), torch.tensor([int(branch)]), {})

    mean.after(loss(2.0, Branch.DIFFUSION), (1,))
    assert mean.after(loss(50.0, Branch.CONSISTENCY), (3,)).item() == pytest.approx((2 + 10) / 3)
    assert mean.after(loss(70.0, Branch.FREE), (5,)).item() == pytest.approx((2 + 10) / 3)


def test_rebalancing_without_diffusion_samples_is_refused() -> None:
    objective = flow_map_update("none").terms[0].objective
    with pytest.raises(ValueError, match="diffusion is 0"):
        Term(name="flow_map", objective=objective, rebalance="weighted")
