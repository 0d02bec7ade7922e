"""Gradient checkpointing: what each policy recomputes, and that gradients do not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from anyflow_train.models.recompute import RECOMPUTE
from tests.models.networks import clean_inputs, far_inputs, inputs, small, small_far

LAYERS = 2
NETWORKS = {
    "bidirectional": (small, inputs),
    "causal": (small_far, lambda: far_inputs((1, 2, 1), 3) | clean_inputs(3)),
}


class Counter(TorchDispatchMode):
    """Counts self-attentions: calls of the fused kernel, which a CPU takes for more than a few keys."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return func(*args, **(kwargs or {}))


def gradients(name: str, policy: str, compiled: bool = False) -> list[Tensor | None]:
    make, given = NETWORKS[name]
    network: Any = make(num_layers=LAYERS)
    recompute = RECOMPUTE.get(policy)
    if compiled:
        torch._dynamo.reset()
        network.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        recompute = recompute and torch.compile(recompute, fullgraph=True, backend="aot_eager")
    if recompute is not None:
        network.enable_gradient_checkpointing(recompute)
    network(**given()).sample.square().sum().backward()
    return [weight.grad for weight in network.parameters()]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("policy", RECOMPUTE)
def test_the_gradient_is_the_same_to_the_bit(name: str, policy: str) -> None:
    plain, found = gradients(name, "none"), gradients(name, policy)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True) if a is not None and b is not None)
    assert [grad is None for grad in plain] == [grad is None for grad in found]


@pytest.mark.parametrize("name", NETWORKS)
def test_selective_does_no_attention_again(name: str) -> None:
    calls = {}
    for policy in ("none", *RECOMPUTE):
        with Counter() as counter:
            gradients(name, policy)
        calls[policy] = counter.calls
    assert calls["none"] >= LAYERS
    assert calls["block"] == 2 * calls["none"]
    assert calls["selective"] == calls["none"]


@pytest.mark.parametrize(
    ("name", "policy"), [pytest.param("bidirectional", "none", marks=pytest.mark.nightly), ("causal", "selective")]
)
def test_compiled_blocks_have_the_same_gradient(name: str, policy: str) -> None:
    plain, found = gradients(name, "none"), gradients(name, policy, compiled=True)
    for a, b in zip(plain, found, strict=True):
        if a is not None and b is not None:  # norms and GELU use other formulas, in float32
            assert (a - b).abs().max() <= 2e-5 * a.abs().max()
