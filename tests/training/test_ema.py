"""The average's closed form, and that looking through it leaves the network as it was."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyflow_train.config.run import Ema as EmaConfig
from anyflow_train.flow.types import Condition, FlowMapWithin
from anyflow_train.training.ema import Ema


def test_a_copy_before_the_start_then_the_geometric_sum() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ema = Ema({"p": parameter}, EmaConfig(decay=0.75, start_step=2))
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    seen = []
    for step, value in enumerate(values):
        parameter.data.fill_(value)
        ema.update(step)
        seen.append(next(iter(ema.tensors()))[1][0].item())
    # copies of 1 and 2; then 2 (3/4)^n and each later value times 1/4 (3/4)^age: exact in float32
    expected = [1.0, 2.0]
    expected += [2 * 0.75**n + sum(0.25 * 0.75 ** (n - 1 - i) * values[2 + i] for i in range(n)) for n in (1, 2, 3)]
    assert seen == expected


def test_the_network_holds_the_averages_only_inside_the_block() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(dict(module.named_parameters()), EmaConfig(decay=0.5, start_step=0))
    averaged = module.weight.detach().clone()
    module.weight.data.add_(1)
    live = module.weight.detach().clone()
    with ema.applied():
        assert torch.equal(module.weight, averaged)
    assert torch.equal(module.weight, live)
    assert torch.equal(dict(ema.tensors())["weight"], averaged)


def test_a_graph_recorded_before_keeps_its_weights() -> None:
    """`derivative_network: ema` runs between the student's forward and its backward."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    x = torch.ones(1, 2)
    module(x).sum().backward()
    expected = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
    module.zero_grad()
    ema = Ema(dict(module.named_parameters()), EmaConfig(decay=0.5, start_step=0))
    for _, average in ema.tensors():
        average.fill_(7)

    def live(x: Tensor, t: Tensor, r: Tensor, condition: Condition) -> Tensor:
        return module(x)

    loss = module(x).sum()
    through = FlowMapWithin(live, ema.applied)(x, x, x, Condition(x))
    assert through.item() == 7 * 7 * 3 * 2 + 7  # two layers of sevens: 7 (7 + 7 + 7) (two units) + 7
    assert not through.requires_grad
    loss.backward()
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
