"""Names of the student's layers, for rules, which do not import torch. A test compares them with the network itself."""

from __future__ import annotations

from anyflow_train.config.network import Architecture


def layers(architecture: Architecture) -> dict[str, bool]:
    """Map every module that holds weights of its own, except whole blocks, to whether it is a linear layer."""
    embedder = "condition_embedder"
    parts = ("time_embedder", "delta_embedder", "text_embedder")
    linear = [f"{embedder}.{part}.linear_{number}" for part in parts for number in (1, 2)]
    linear += [f"{embedder}.time_proj", "proj_out"]
    others = ["patch_embedding"] if architecture.causal is None else ["patch_embedding", "far_patch_embedding"]
    for block in (f"blocks.{number}" for number in range(architecture.num_layers)):
        for attention in (f"{block}.attn1", f"{block}.attn2"):
            linear += [f"{attention}.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
            others += [f"{attention}.norm_q", f"{attention}.norm_k"]
        linear += [f"{block}.ffn.net.0.proj", f"{block}.ffn.net.2"]
        others += [f"{block}.norm2"] if architecture.cross_attn_norm else []
    return dict.fromkeys(linear, True) | dict.fromkeys(others, False)
