"""Products in fp8: their error, where they are used, and which layers stay unchanged."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from anyflow_train.config.network import Lora
from anyflow_train.errors import UserError
from anyflow_train.models.adapters import add_lora, merge_lora, trainable_parameters
from anyflow_train.models.fp8 import Fp8Linear, StoredFp8Linear, multiply_in_fp8, rows_in_fp8, store_in_fp8
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from tests.models.networks import inputs, small

WIDTHS = {"attention_head_dim": 16, "ffn_dim": 48}
LORA = Lora(kind="lora", rank=4, alpha=4.0)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(64, 96).requires_grad_(False)


def tokens(count: int = 40) -> Tensor:
    return torch.randn(2, count, 64, generator=torch.Generator().manual_seed(1))


def adapted(**changes: object) -> AnyFlowTransformer3DModel:
    """Build a network with fp8 frozen layers and nonzero adapters."""
    network = small(**WIDTHS, **changes)
    add_lora(network, LORA, seed=4)
    draw = torch.Generator().manual_seed(7)
    for parameter in trainable_parameters(network).values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    return network


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def test_a_number_is_off_by_what_three_bits_of_mantissa_are() -> None:
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-6, 2)[:, None]
    x[3] = 0
    values, scales = rows_in_fp8(x)
    assert values.dtype == torch.float8_e4m3fn
    error = (values.float() * scales - x).abs()
    # half a step of 3 bits, or of the smallest numbers: 2^-9 of the scale
    assert (error <= torch.maximum(x.abs() / 16, scales * 2**-10)).all()
    largest = x.abs().amax(dim=1)
    torch.testing.assert_close((values.float() * scales).abs().amax(dim=1), largest)


def test_products_are_off_by_two_such_roundings() -> None:
    plain = layer()
    with bfloat16():
        found = Fp8Linear(plain)(tokens())
    assert found.dtype == torch.bfloat16
    # A rounding error is uniform within half a step, and a step is 1/8 to 1/16 of the number: 2.6 % rms for numbers of
    # all sizes alike. Both factors have one; bfloat16's own 0.2 % does not count.
    assert off(found, linear(tokens().double(), plain.weight.double(), plain.bias.double())) == pytest.approx(
        0.026 * 2**0.5, rel=0.15
    )


def test_only_the_input_has_a_gradient_and_a_precise_one() -> None:
    plain, x = layer(), tokens().requires_grad_()
    direction = torch.randn(2, 40, 96, generator=torch.Generator().manual_seed(2))
    with bfloat16():
        (Fp8Linear(plain)(x) * direction).sum().backward()
    assert plain.weight.grad is None
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    # bfloat16's rounding of both factors and of the product
    assert off(x.grad, direction.double() @ plain.weight.double()) < 0.005


@pytest.mark.parametrize("precision", [None, torch.float16])
def test_without_bfloat16_it_is_the_plain_layer(precision: torch.dtype | None) -> None:
    plain = layer()
    with torch.autocast("cpu", precision, enabled=precision is not None):
        assert torch.equal(Fp8Linear(plain)(tokens()), plain(tokens()))


def test_a_token_gets_the_same_whatever_is_beside_it() -> None:
    """Tokens can therefore be split over processes without changing the result."""
    eight = Fp8Linear(layer())
    with bfloat16():
        assert torch.equal(eight(tokens())[:, :16], eight(tokens()[:, :16]))


def test_a_stored_layer_takes_a_byte_and_computes_the_same() -> None:
    plain = layer()
    stored = StoredFp8Linear(plain)
    assert (stored.weight.dtype, stored.weight.nbytes) == (torch.float8_e4m3fn, 64 * 96)
    with bfloat16():
        assert torch.equal(stored(tokens()), Fp8Linear(plain)(tokens()))


def test_frozen_layers_of_blocks_are_replaced_and_their_names_stay() -> None:
    network, plain = adapted(), adapted()
    multiply_in_fp8(network)
    replaced = {path for path, module in network.named_modules() if isinstance(module, Fp8Linear)}
    wanted = {path for path, module in plain.blocks.named_modules() if type(module) is nn.Linear}
    assert replaced == {f"blocks.{path}" for path in wanted if ".lora_" not in path}
    assert len(replaced) == 2 * 10
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert trainable_parameters(network).keys() == trainable_parameters(plain).keys()
    merged, expected = merge_lora(network).state_dict(), merge_lora(plain).state_dict()
    assert all(torch.equal(merged[name], weight) for name, weight in expected.items())


def test_what_is_trained_stays_as_it_is() -> None:
    network = small(**WIDTHS)
    multiply_in_fp8(network)
    assert not any(isinstance(module, Fp8Linear) for module in network.modules())


def velocity_and_gradients(network: AnyFlowTransformer3DModel) -> tuple[Tensor, dict[str, Tensor]]:
    with bfloat16():
        velocity = network(**inputs()).sample
    velocity.float().square().sum().backward()
    return velocity.detach(), {name: p.grad for name, p in trainable_parameters(network).items() if p.grad is not None}


def test_adapters_learn_through_the_frozen_base() -> None:
    eight, plain = adapted(), adapted()
    multiply_in_fp8(eight)
    (found, gradients), (wanted, precise) = velocity_and_gradients(eight), velocity_and_gradients(plain)
    assert 0.005 < off(found, wanted) < 0.1
    assert gradients.keys() == precise.keys() == trainable_parameters(plain).keys()
    together, expected = (torch.cat([g.flatten() for g in each.values()]) for each in (gradients, precise))
    assert off(together, expected) < 0.2  # a layer's 4 %, over two blocks and into the square
    assert all(parameter.grad is None for parameter in eight.parameters() if not parameter.requires_grad)


def test_checkpointed_blocks_are_recomputed_in_8_bits() -> None:
    kept, checkpointed = adapted(), adapted()
    checkpointed.enable_gradient_checkpointing()
    for network in (kept, checkpointed):
        multiply_in_fp8(network)
    (found, gradients), (wanted, expected) = velocity_and_gradients(checkpointed), velocity_and_gradients(kept)
    assert torch.equal(found, wanted)
    assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())


def test_a_frozen_network_is_stored_and_called_without_gradient() -> None:
    plain = small(**WIDTHS).requires_grad_(False)
    stored = small(**WIDTHS).requires_grad_(False)
    store_in_fp8(stored)
    assert sum(isinstance(module, StoredFp8Linear) for module in stored.modules()) == 2 * 10
    given = inputs()
    with torch.no_grad(), bfloat16():
        assert 0.005 < off(stored(**given).sample, plain(**given).sample) < 0.1


def test_it_compiles_without_a_break() -> None:
    eight = Fp8Linear(layer())
    compiled = torch.compile(eight, backend="aot_eager", fullgraph=True)
    with bfloat16():
        # the product may have one bfloat16 rounding less before the bias is added
        assert off(compiled(tokens()), eight(tokens())) < 0.005


def test_a_size_that_no_gpu_takes_is_refused() -> None:
    network = small(ffn_dim=40, attention_head_dim=16).requires_grad_(False)
    with pytest.raises(UserError, match=r"multiples of 16.*40 x 32") as caught:
        store_in_fp8(network)
    assert caught.value.where == "engine.fp8"
