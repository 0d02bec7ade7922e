"""Operations, counted from shapes, against torch's own counter on real networks."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anyflow_train.config.network import LORA_TARGETS, Architecture, FullTraining, Lora
from anyflow_train.config.rows import Rows
from anyflow_train.models.adapters import add_lora
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from anyflow_train.plan import products
from anyflow_train.plan.products import Products, forward_products

SMALL = Architecture(
    num_attention_heads=2,
    attention_head_dim=12,
    text_dim=20,
    freq_dim=32,
    ffn_dim=40,
    num_layers=2,
    rope_max_seq_len=16,
)
WAN_1_3B = Architecture(num_attention_heads=12, ffn_dim=8960, num_layers=30)
TOKENS, TEXT = 3 * 3 * 4, 40
WIDTH = 24
TIMES = tuple(f"{which}_embedder.linear_{number}" for which in ("time", "delta") for number in (1, 2))
# Torch's unfused attention leaves out the gradients of queries, text keys and text values that nobody needs, a product
# of the size of the scores each: two in each of two blocks here, or three in all where the text keys are trained. Fused
# kernels make all three gradients together, and that is what a plan counts.
ONE_PRODUCT = 2 * TOKENS * TEXT * WIDTH
ADAPTERS = {
    "full": (FullTraining(), 0),
    "lora": (Lora(kind="lora", rank=4), 4),
    "lora of the times too": (Lora(kind="lora", rank=4, targets=LORA_TARGETS + TIMES), 4),
    "whole modules": (Lora(kind="lora", rank=4, targets=("attn2.to_k",), full_modules=("proj_out",)), 3),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
def test_operations_are_torchs_count(name: str, checkpointing: bool, unfused: None) -> None:
    adapter, left_out = ADAPTERS[name]
    network = AnyFlowTransformer3DModel(**SMALL.arguments())
    if isinstance(adapter, Lora):
        add_lora(network, adapter, 0)
    if checkpointing:
        network.enable_gradient_checkpointing()
    forward, backward = counted(network)
    planned = forward_products(SMALL, adapter, Rows.whole(TOKENS), TEXT)
    assert forward == planned.forward
    again = planned.recomputed("block" if checkpointing else "none")
    assert backward == planned.backward + again - left_out * ONE_PRODUCT


def test_fused_attention_makes_five_products_backward() -> None:
    planned = forward_products(SMALL, FullTraining(), Rows.whole(TOKENS), TEXT)
    scores = [product for product in planned.blocks if isinstance(product, products.Scores)]
    assert all(product.backward == 5 * product.forward // 2 for product in scores)


def test_a_forward_of_the_published_model() -> None:
    """32,760 tokens, 81 frames of 480x832: known as 283 TFLOP; a backward without recomputation is two and a bit."""
    planned: Products = forward_products(WAN_1_3B, FullTraining(), Rows.whole(32_760), 512)
    assert planned.forward == pytest.approx(283e12, rel=1e-3)
    assert 2.0 < planned.backward / planned.forward < 2.5


def counted(network: AnyFlowTransformer3DModel) -> tuple[int, int]:
    times = torch.rand(1) * 1000
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            (out,) = network(torch.randn(1, 3, 16, 6, 8), times, times, torch.randn(1, TEXT, 20), return_dict=False)
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()
