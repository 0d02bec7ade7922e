"""Networks from constructor arguments: with random weights, or with weights that are read one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor

from anyflow_train.models.embeddings import resized_patch
from anyflow_train.models.far_transformer import AnyFlowFARTransformer3DModel
from anyflow_train.models.transformer import AnyFlowTransformer3DModel

Read = Callable[[str], Tensor]
"""Model name of a weight -> the weight, float32, on the CPU. It may lie in a file: clone it before it is changed."""


def network_class(arguments: Mapping[str, Any]) -> type:
    """`AnyFlowFARTransformer3DModel` for constructor arguments with chunks, else `AnyFlowTransformer3DModel`."""
    return AnyFlowFARTransformer3DModel if "chunk_partition" in arguments else AnyFlowTransformer3DModel


def build_empty(arguments: Mapping[str, Any]) -> Any:
    """A network on the meta device: names and shapes, no memory and no random numbers."""
    with torch.device("meta"):
        return network_class(arguments)(**arguments)


def assemble(arguments: Mapping[str, Any], read: Read) -> Any:
    """A network on the CPU whose weights are read, in memory of its own."""
    network = build_empty(arguments)
    weights = {name: read(name).clone() for name, _ in network.named_parameters()}
    network.load_state_dict(weights, strict=True, assign=True)
    return network


def build_network(arguments: Mapping[str, Any], seed: int, time_frequency_limit: float | None = None) -> Any:
    """A network with random weights, a function of (arguments, seed) alone.

    Args:
        arguments: of the constructor.
        seed: of the weights.
        time_frequency_limit: in radians per 1/1000 of time. Time features that turn faster start damped in proportion:
            left at full strength, a network that is trained from scratch becomes rough in time, and the difference
            quotient of the flow-map objective then measures that roughness.
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
