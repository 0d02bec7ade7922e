"""Names and shapes of the student's parameters, from its architecture alone: counted without torch.

A test compares this with the network itself, name by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from anyflow_train.config.network import Architecture, FullTraining, Lora

Shapes = dict[str, tuple[int, ...]]


def parameter_shapes(architecture: Architecture) -> Shapes:
    """Every parameter of the student: name -> shape."""
    width = architecture.num_attention_heads * architecture.attention_head_dim
    patch = math.prod(architecture.patch_size)
    shapes: Shapes = {
        "patch_embedding.weight": (width, architecture.in_channels, *architecture.patch_size),
        "patch_embedding.bias": (width,),
        "scale_shift_table": (1, 2, width),
    }
    if architecture.causal is not None:
        far = architecture.causal.compressed_patch_size
        shapes["far_patch_embedding.weight"] = (width, architecture.in_channels, *far)
        shapes["far_patch_embedding.bias"] = (width,)
    shapes |= _linear("proj_out", width, architecture.out_channels * patch)
    shapes |= _condition_embedder(architecture, width)
    for layer in range(architecture.num_layers):
        shapes |= _block(f"blocks.{layer}", architecture, width)
    return shapes


def linear_layers(architecture: Architecture) -> list[str]:
    """Names of the layers that an adapter can change: those with a matrix as weight."""
    suffix = ".weight"
    return [
        name.removesuffix(suffix)
        for name, shape in parameter_shapes(architecture).items()
        if name.endswith(suffix) and len(shape) == 2
    ]


def matches(name: str, targets: Iterable[str]) -> bool:
    """Whether a module is one of `targets`, by peft's rule: equal, or ending in `.target`."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def count_parameters(architecture: Architecture) -> int:
    """Numbers in the whole student, without adapters."""
    return sum(math.prod(shape) for shape in parameter_shapes(architecture).values())


def trained_sizes(architecture: Architecture, adapter: FullTraining | Lora) -> list[int]:
    """Numbers of every tensor that is trained."""
    shapes = parameter_shapes(architecture)
    if isinstance(adapter, FullTraining):
        return [math.prod(shape) for shape in shapes.values()]
    adapted = [name for name in linear_layers(architecture) if matches(name, adapter.targets)]
    low_rank = [adapter.rank * side for name in adapted for side in shapes[f"{name}.weight"]]
    return low_rank + [math.prod(shape) for name, shape in shapes.items() if in_modules(name, adapter.full_modules)]


def count_trainable(architecture: Architecture, adapter: FullTraining | Lora) -> int:
    """Numbers that are trained."""
    return sum(trained_sizes(architecture, adapter))


def in_modules(parameter: str, modules: Iterable[str]) -> bool:
    """Whether a parameter lies inside of one of `modules` (given whole or by their last parts)."""
    parents = parameter.split(".")[:-1]
    return any(matches(".".join(parents[:depth]), modules) for depth in range(1, len(parents) + 1))


def _linear(name: str, fan_in: int, fan_out: int) -> Shapes:
    return {f"{name}.weight": (fan_out, fan_in), f"{name}.bias": (fan_out,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _condition_embedder(architecture: Architecture, width: int) -> Shapes:
    prefix = "condition_embedder"
    shapes: Shapes = {}
    for embedder in ("time_embedder", "delta_embedder"):
        shapes |= _linear(f"{prefix}.{embedder}.linear_1", architecture.freq_dim, width)
        shapes |= _linear(f"{prefix}.{embedder}.linear_2", width, width)
    shapes |= _linear(f"{prefix}.time_proj", width, 6 * width)
    shapes |= _linear(f"{prefix}.text_embedder.linear_1", architecture.text_dim, width)
    shapes |= _linear(f"{prefix}.text_embedder.linear_2", width, width)
    if architecture.image_dim is not None:
        image = architecture.image_dim
        shapes |= _norm(f"{prefix}.image_embedder.norm1", image)
        shapes |= _linear(f"{prefix}.image_embedder.ff.net.0.proj", image, image)
        shapes |= _linear(f"{prefix}.image_embedder.ff.net.2", image, width)
        shapes |= _norm(f"{prefix}.image_embedder.norm2", width)
    return shapes


def _block(prefix: str, architecture: Architecture, width: int) -> Shapes:
    shapes: Shapes = {f"{prefix}.scale_shift_table": (1, 6, width)}
    for attention in ("attn1", "attn2"):
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= _linear(f"{prefix}.{attention}.{projection}", width, width)
        for norm in ("norm_q", "norm_k"):
            shapes[f"{prefix}.{attention}.{norm}.weight"] = (width,)
    shapes |= _linear(f"{prefix}.ffn.net.0.proj", width, architecture.ffn_dim)
    shapes |= _linear(f"{prefix}.ffn.net.2", architecture.ffn_dim, width)
    if architecture.cross_attn_norm:
        shapes |= _norm(f"{prefix}.norm2", width)
    return shapes
