"""The student's layers, for rules and checks that do not import torch. A test compares them with the network itself."""

from __future__ import annotations

import math

from anyflow_train.config.network import Architecture


def layers(architecture: Architecture) -> dict[str, tuple[int, int] | None]:
    """Map every module that holds weights of its own, except whole blocks, to its numbers of inputs and outputs.

    None stands for a module that is not a linear layer.
    """
    width, ffn = architecture.num_attention_heads * architecture.attention_head_dim, architecture.ffn_dim
    embedder, times = "condition_embedder", architecture.freq_dim
    linear = {}
    for part, inputs in (("time", times), ("delta", times), ("text", architecture.text_dim)):
        linear |= {f"{embedder}.{part}_embedder.linear_1": (inputs, width)}
        linear |= {f"{embedder}.{part}_embedder.linear_2": (width, width)}
    linear |= {f"{embedder}.time_proj": (width, 6 * width)}
    linear |= {"proj_out": (width, math.prod(architecture.patch_size) * architecture.out_channels)}
    others = ["patch_embedding"] if architecture.causal is None else ["patch_embedding", "far_patch_embedding"]
    for block in (f"blocks.{number}" for number in range(architecture.num_layers)):
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            linear |= {f"{attention}.{layer}": (width, width) for layer in ("to_q", "to_k", "to_v", "to_out.0")}
            others += [f"{attention}.norm_q", f"{attention}.norm_k"]
        linear |= {f"{block}.ffn.net.0.proj": (width, ffn), f"{block}.ffn.net.2": (ffn, width)}
        others += [f"{block}.norm2"] if architecture.cross_attn_norm else []
    return linear | dict.fromkeys(others)
