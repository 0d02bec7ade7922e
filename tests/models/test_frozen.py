"""Frozen linear layers in bfloat16: the numbers of float32 layers under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_train.config.network import Lora
from anyflow_train.models.adapters import add_lora, trainable_parameters
from anyflow_train.models.build import build_empty, fill
from anyflow_train.models.fp8 import multiply_in_fp8
from anyflow_train.models.frozen import HalfLinear, store_in_bfloat16
from tests.models.networks import FAR, SMALL, far_inputs, inputs, small, small_far

LORA = Lora(kind="lora", rank=2, alpha=3.0, full_modules=("delta_embedder", "attn2.to_k"))


def stored(network: Any, arguments: dict[str, Any], trained: tuple[str, ...] = ()) -> Any:
    """Return a copy whose frozen weights are in bfloat16."""
    weights = dict(network.named_parameters())
    return fill(store_in_bfloat16(build_empty(arguments), trained), lambda name: weights[name].detach())


def gradients(network: Any, given: dict[str, Any]) -> list[Tensor]:
    """Output, and the gradients of the latents and of everything that is trained, under bfloat16 autocast."""
    add_lora(network, LORA, 0)
    trained = trainable_parameters(network)
    for name, parameter in trained.items():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    x = given["hidden_states"].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = network(**given).sample
    found.sin().sum().backward()
    return [found, x.grad, *(parameter.grad for parameter in trained.values())]


@pytest.mark.parametrize(
    ("build", "arguments", "given"), [(small, SMALL, inputs()), (small_far, SMALL | FAR, far_inputs((1, 2, 1), 4))]
)
def test_outputs_and_gradients_are_bit_equal_under_autocast(build: Any, arguments: Any, given: dict[str, Any]) -> None:
    found = gradients(stored(build(), arguments, LORA.full_modules), given)
    given["hidden_states"] = given["hidden_states"].detach()
    for ours, wanted in zip(found, gradients(build(), given), strict=True):
        assert torch.equal(ours, wanted)


def test_without_autocast_the_rounded_weights_multiply_in_float32() -> None:
    rounded, half = small(), stored(small(), SMALL)
    for module, other in zip(rounded.modules(), half.modules(), strict=True):
        if isinstance(other, HalfLinear):
            for name, weight in module.named_parameters():
                weight.data = weight.detach().bfloat16().float()
                assert other.get_parameter(name).dtype == torch.bfloat16
    assert torch.equal(half(**inputs()).sample, rounded(**inputs()).sample)
    assert torch.equal(stored_in_fp8(half)(**inputs()).sample, rounded(**inputs()).sample)


def stored_in_fp8(network: Any) -> Any:
    """Let a network multiply in fp8, which it does not without autocast. Layers of another size are kept."""
    for block in network.blocks:
        block.requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anyflow_train.models.fp8.MULTIPLE", 1)
        multiply_in_fp8(network)
    return network


def test_only_layers_that_autocast_rounds_are_stored_so() -> None:
    network = store_in_bfloat16(build_empty(SMALL), ("attn2.to_k",))
    wide = {name for name, parameter in network.named_parameters() if parameter.dtype == torch.float32}
    layers = {name.removesuffix(".weight") for name in wide if name.endswith("weight") and "norm" not in name}
    assert layers == {
        "patch_embedding",
        "condition_embedder.time_proj",
        *(f"condition_embedder.{kind}_embedder.linear_{n}" for kind in ("time", "delta") for n in (1, 2)),
        *(f"blocks.{n}.attn2.to_k" for n in range(SMALL["num_layers"])),
    }
    assert {"scale_shift_table", "blocks.0.scale_shift_table", "blocks.0.attn1.norm_q.weight"} <= wide
