"""Print launches and bytes of a transformer block of the 1.3B model at 81 frames of 480x832, as a Markdown table.

FOLDER/run python -m tests.pretended_gpu.block     # see setup; --compile: of compiled blocks
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow_train.config.network import LORA_TARGETS, Lora
from anyflow_train.models.adapters import add_lora
from anyflow_train.models.frozen import store_in_bfloat16
from anyflow_train.models.recompute import RECOMPUTE
from anyflow_train.models.transformer import AnyFlowTransformer3DModel
from anyflow_train.text import markdown_table
from tests.pretended_gpu.counter import counted, total, traffic

TIMES = tuple(f"{kind}_embedder.linear_{n}" for kind in ("time", "delta") for n in (1, 2))
PUBLISHED = Lora(kind="lora", targets=(*LORA_TARGETS, *TIMES))
CLIP, TEXT = (1, 21, 16, 60, 104), (1, 512, 4096)
KINDS = ("elementwise", "product", "attention")
GIGA = 1e9

Count = tuple[int, Counter[str]]
"""Launches, and bytes by kind."""


def build(blocks: int, trained: str, checkpointing: str, compiled: bool) -> AnyFlowTransformer3DModel:
    """Build a network on the GPU: a frozen one, one with the published adapters, or one of which all is trained."""
    with torch.device("cuda"):
        network = AnyFlowTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=blocks)
        if trained != "all weights":
            store_in_bfloat16(network)
        if trained == "adapters":
            add_lora(network, PUBLISHED, 0)
    recompute: Any = RECOMPUTE.get(checkpointing)
    if compiled:
        network.compile_repeated_blocks(fullgraph=True)
        recompute = recompute and torch.compile(recompute, fullgraph=True)
    if recompute is not None:
        network.enable_gradient_checkpointing(recompute)
    return torch.nn.Module.to(network, "cuda")


def passes(network: AnyFlowTransformer3DModel, gradient: bool) -> Iterator[Callable[[], Any]]:
    """Yield the passes of a step: forward, and backward if there is a gradient."""
    x, text, t = (torch.randn(shape, device="cuda") for shape in (CLIP, TEXT, (1,)))
    made: list[torch.Tensor] = []

    def forward() -> None:
        with torch.autocast("cuda", torch.bfloat16), torch.set_grad_enabled(gradient):
            made.append(network(x.requires_grad_(gradient), t, t, text).sample)

    yield forward
    if gradient:
        yield made.pop().square().mean().backward


def measure(blocks: int, trained: str, checkpointing: str, gradient: bool, compiled: bool) -> list[Count]:
    """Count what each pass of a network launches and moves."""
    network = build(blocks, trained, checkpointing, compiled)
    moved: list[Counter[str]] = []
    for call in passes(network, gradient):
        call()  # the first step also compiles kernels and makes tables
    network.zero_grad(set_to_none=True)
    with tempfile.TemporaryDirectory() as folder:
        launched = [total(counted(call, Path(folder))) for call in passes(network, gradient)]
    network.zero_grad(set_to_none=True)
    for call in passes(network, gradient):
        with traffic() as found:
            call()
        moved.append(found)
    del network
    gc.collect()
    return list(zip(launched, moved, strict=True))


def per_block(*settings: Any) -> list[Count]:
    """Count what one more block adds to each pass."""
    few, more = (measure(blocks, *settings) for blocks in (1, 2))
    return [(b[0] - a[0], b[1] - a[1]) for a, b in zip(few, more, strict=True)]


CASES = {
    "frozen, no gradient": ("nothing", "none", False),
    "adapters, no gradient": ("adapters", "none", False),
    "adapters": ("adapters", "none", True),
    "adapters, selective": ("adapters", "selective", True),
    "adapters, block": ("adapters", "block", True),
    "all weights": ("all weights", "none", True),
    "all weights, selective": ("all weights", "selective", True),
}
"""What is trained, what a backward pass recomputes, and whether there is a gradient."""


def table(compiled: bool) -> list[str]:
    """Lines of the Markdown table."""
    rows = [["block", "pass", "launches", *(f"{kind}, GB" for kind in KINDS)]]
    for name, settings in CASES.items():
        # Without a gradient there is a forward pass only.
        for label, (launched, moved) in zip(("forward", "backward"), per_block(*settings, compiled), strict=False):
            rows.append([name, label, str(launched), *(f"{moved[kind] / GIGA:.2f}" for kind in KINDS)])
            print(rows[-1], flush=True)
    return markdown_table(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # cuDNN's is not part of torch
        print(*table(parser.parse_args().compile), sep="\n")
