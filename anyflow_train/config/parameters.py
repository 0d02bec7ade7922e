"""Names of the student's layers and parameters, for rules, which do not import torch.

A test compares them with the network itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from anyflow_train.config.network import Architecture

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def linear_layers(architecture: Architecture) -> list[str]:
    """List the names of the linear layers, which adapters can change."""
    embedder = "condition_embedder"
    embedders = ["time_embedder", "delta_embedder", "text_embedder"]
    layers = [f"{embedder}.{part}.linear_{number}" for part in embedders for number in (1, 2)]
    layers.append(f"{embedder}.time_proj")
    for block in _blocks(architecture):
        layers += [f"{block}.{attention}.{layer}" for attention in ("attn1", "attn2") for layer in _ATTENTION]
        layers += [f"{block}.ffn.net.{place}" for place in ("0.proj", "2")]
    return [*layers, "proj_out"]


def parameter_names(architecture: Architecture) -> list[str]:
    """List the names of all parameters."""
    with_bias = [*linear_layers(architecture), "patch_embedding"]
    bare = ["scale_shift_table"]
    if architecture.causal is not None:
        with_bias.append("far_patch_embedding")
    for block in _blocks(architecture):
        bare.append(f"{block}.scale_shift_table")
        bare += [f"{block}.{attention}.norm_{side}.weight" for attention in ("attn1", "attn2") for side in "qk"]
        if architecture.cross_attn_norm:
            with_bias.append(f"{block}.norm2")
    return [*bare, *(f"{layer}.{part}" for layer in with_bias for part in ("weight", "bias"))]


def matches(name: str, targets: Iterable[str]) -> bool:
    """Whether a module is one of `targets`, by peft's rule: equal, or ending in `.target`."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def in_modules(parameter: str, modules: Iterable[str]) -> bool:
    """Whether a parameter is inside one of `modules` (full names or their last parts)."""
    parents = parameter.split(".")[:-1]
    return any(matches(".".join(parents[:depth]), modules) for depth in range(1, len(parents) + 1))


def _blocks(architecture: Architecture) -> list[str]:
    return [f"blocks.{number}" for number in range(architecture.num_layers)]
