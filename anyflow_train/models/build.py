"""Build networks from constructor arguments, with random weights or with weights that are read one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor

from anyflow_train.errors import UserError
from anyflow_train.models.embeddings import resized_patch
from anyflow_train.models.far_transformer import AnyFlowFARTransformer3DModel
from anyflow_train.models.transformer import AnyFlowTransformer3DModel

MOST_LAYERS = 1000
"""Layers of a network that others describe. Each takes memory, also on the meta device."""

Read = Callable[[str], Tensor]
"""Model name -> weight, float32, on the CPU. It may be mapped from a file: clone it before you change it."""


def network_class(arguments: Mapping[str, Any]) -> type:
    """Network class for constructor arguments: causal if they have a `chunk_partition`, else bidirectional."""
    return AnyFlowFARTransformer3DModel if "chunk_partition" in arguments else AnyFlowTransformer3DModel


def build_empty(arguments: Mapping[str, Any]) -> Any:
    """Build a network on the meta device, which takes no memory and draws no random numbers."""
    with torch.device("meta"):
        return network_class(arguments)(**arguments)


def build_described(arguments: Mapping[str, Any], where: str | Path) -> Any:
    """Build a network on the meta device from a config that others wrote.

    Args:
        where: file or folder of the config, for errors.

    Raises:
        UserError: the config does not describe a network.
    """
    layers = arguments.get("num_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise UserError(str(where), f"has num_layers = {layers} in its config, which are more than {MOST_LAYERS}")
    try:
        return build_empty(arguments)
    except Exception as error:  # the config can be wrong in any way
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason'}"
        raise UserError(str(where), f"has a config that does not describe a network ({problem})") from error


def assemble(arguments: Mapping[str, Any], read: Read) -> Any:
    """Build a network on the CPU from copies of the weights that `read` returns."""
    return fill(build_empty(arguments), read)


def fill(network: Any, read: Read) -> Any:
    """Give a network on the meta device copies of the weights that `read` returns, in its own dtypes."""
    weights = {name: read(name).to(parameter.dtype, copy=True) for name, parameter in network.named_parameters()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network


def build_network(arguments: Mapping[str, Any], seed: int, time_frequency_limit: float | None = None) -> Any:
    """Build a network whose random weights depend only on the arguments of this function.

    Args:
        arguments: constructor arguments.
        seed: seed of the weights.
        time_frequency_limit: radians per 1/1000 of time; None for no limit. The weights of faster time features start
            smaller in proportion. Without it, a network trained from scratch becomes rough in time, and the central
            difference of the flow-map objective measures that roughness.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = network_class(arguments)(**arguments)
    embedder = network.condition_embedder
    if time_frequency_limit is not None:
        _damp_fast_features(embedder.time_embedder, time_frequency_limit)
    embedder.delta_embedder.load_state_dict(embedder.time_embedder.state_dict())
    if isinstance(network, AnyFlowFARTransformer3DModel):
        weights = network.patch_embedding.state_dict()
        weights["weight"] = resized_patch(weights["weight"], network.config["compressed_patch_size"])
        network.far_patch_embedding.load_state_dict(weights)
    return network


def _damp_fast_features(embedder: TimestepEmbedding, limit: float) -> None:
    layer = embedder.linear_1
    count = layer.in_features // 2
    frequency = torch.exp(torch.arange(count) * (-math.log(10000.0) / count))
    with torch.no_grad():
        layer.weight.mul_((limit / frequency).clamp(max=1.0).repeat(2))  # the cosines, then the sines
