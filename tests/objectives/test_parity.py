"""The published settings against a second implementation of the published formulas, per sample in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from anyflow_train.config.objective import FlowMatching, Times
from anyflow_train.config.objectives import FlowMap
from anyflow_train.config.positions import branch_counts
from anyflow_train.flow.times import TimePrecision
from anyflow_train.flow.types import Condition
from anyflow_train.objectives.flow_map import FlowMapObjective
from anyflow_train.objectives.flow_matching import FlowMatchingObjective
from anyflow_train.objectives.rebalance import balance_value, rebalanced
from tests.objectives.toys import SHAPE, SmallNetwork, batch_of, draw_of, one_network

SLOTS = tuple(range(12))
EPSILON, SHIFT, DROPOUT = 0.005, 5.0, 0.4  # higher dropout than published, so that 12 samples include some


def as_held(time: float, precision: TimePrecision) -> float:
    """Round a time in [0, 1] as the published code does: in bfloat16 on the scale 0..1000."""
    return torch.tensor(time * 1000).bfloat16().item() / 1000 if precision == "bf16" else time


def published_weight(t: float) -> float:
    grid = [5 * k / 1000 / (1 + 4 * k / 1000) for k in range(1000)]
    return t * math.sqrt(1 - t) / (sum(s * math.sqrt(1 - s) for s in grid) / 1000)


def published_loss(network: SmallNetwork, scale: float, precision: TimePrecision) -> Tensor:
    """Steps 1 to 5 of the published forward training on the same random numbers, one sample at a time."""
    batch, draw = batch_of(SLOTS), draw_of(SLOTS)
    noise, uniforms, drops = draw.normal("noise", SHAPE), draw.uniform("interval", 2), draw.uniform("text dropout", 1)
    losses: list[Tensor] = []
    for i in SLOTS:
        t, r = max(uniforms[i].tolist()), min(uniforms[i].tolist())
        r = t if i < 6 else 0.0 if i < 9 else r
        t, r = (as_held(5 * a / (1 + 4 * a), precision) for a in (t, r))
        x0, z = batch.latents[i], noise[i]
        x, v = (1 - t) * x0 + t * z, z - x0
        text = batch.negative.text[0] if drops[i] < DROPOUT else batch.condition.text[i]

        def u(x: Tensor, t: float, text: Tensor, r: float = r) -> Tensor:
            times = torch.tensor([[t], [r]], dtype=torch.float64)
            return network(x[None], times[0], times[1], Condition(text[None]))[0]

        with torch.no_grad():
            later = u(x + EPSILON * v, as_held(t + EPSILON, precision), text)
            earlier = u(x - EPSILON * v, as_held(t - EPSILON, precision), text)
            derivative = (later - earlier) / (2 * EPSILON)
            unconditional = u(x, t, batch.negative.text[0])
        prediction = (u(x, t, text) - (1 - scale) * unconditional) / scale
        target = v - (t - r) * derivative / scale
        losses.append(((prediction - target) ** 2).mean() * published_weight(t))
    diffusion = sum(loss.detach() for loss in losses[:6]) / 6
    balanced = [loss * (diffusion / (loss.detach() + 1e-5)) for loss in losses[6:]]
    return torch.stack(losses[:6] + balanced).sum() / len(SLOTS)


def gradients(loss: Tensor, network: SmallNetwork) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(network.parameters())))


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("scale", [3.0, 1.0])
def test_reference_options_equal_the_published_formulas(precision: TimePrecision, scale: float) -> None:
    config = FlowMap(
        kind="flow_map",
        guidance="prediction",
        guidance_scale=scale,
        text_dropout=DROPOUT,
        derivative_ends="free",
        epsilon=EPSILON,
        weight="beta08",
        rebalance="weighted",
    )
    network = SmallNetwork()
    objective = FlowMapObjective(config, Times(shift=SHIFT, precision=precision), branch_counts(12, 0.5, 0.25))
    loss = objective(one_network(network), batch_of(SLOTS), draw_of(SLOTS))
    mean = balance_value(loss, "weighted")[:6].mean()
    ours = rebalanced(loss, mean, "weighted").sum() / len(SLOTS)
    published = published_loss(network, scale, precision)
    # Both are float64; only the order of operations differs, and is divided by 2 epsilon.
    torch.testing.assert_close(ours, published, rtol=1e-10, atol=0)
    for mine, theirs in zip(gradients(ours, network), gradients(published, network), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-11)
        assert mine.abs().max() > 1e-4


def test_flow_matching_with_guidance_equals_the_published_formula() -> None:
    scale = 3.0
    config = FlowMatching(kind="flow_matching", guidance="prediction", guidance_scale=scale, text_dropout=DROPOUT)
    network, batch, draw = SmallNetwork(), batch_of(SLOTS), draw_of(SLOTS)
    objective = FlowMatchingObjective(config, Times(distribution="logit_normal", shift=SHIFT))
    loss = objective(one_network(network), batch, draw)
    raw = draw.normal("diffusion time", ()).sigmoid()
    t = 5 * raw / (1 + 4 * raw)
    z, x0, broad = draw.normal("noise", SHAPE), batch.latents, t[:, None, None, None, None]
    x = (1 - broad) * x0 + broad * z
    dropped = draw.uniform("text dropout", 1) < DROPOUT
    text = torch.where(dropped[..., None], batch.negative.text, batch.condition.text)
    with torch.no_grad():
        unconditional = network(x, t, t, Condition(batch.negative.text.expand(len(SLOTS), -1, -1)))
    prediction = (network(x, t, t, Condition(text)) - (1 - scale) * unconditional) / scale
    published = ((prediction - (z - x0)) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss.per_sample, published, rtol=1e-10, atol=0)
    ours = gradients(loss.per_sample.sum(), network)
    for mine, theirs in zip(ours, gradients(published.sum(), network), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
    assert torch.equal(loss.weight, torch.ones_like(t))
    assert (loss.branch == 0).all()
    assert 0 < dropped.sum() < len(SLOTS)
