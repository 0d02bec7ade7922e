"""Networks from files (a Wan2.1 transformer becomes a student, an AnyFlow checkpoint stays itself), and random ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import torch
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor

from anyflow_train.errors import UserError
from anyflow_train.models.embeddings import resized_patch
from anyflow_train.models.far_transformer import AnyFlowFARTransformer3DModel
from anyflow_train.models.source import (
    SHARED_CONFIG,
    chunk_arguments,
    describe_source,
    locate,
    network_class,
    unlike_text_to_video,
)
from anyflow_train.models.transformer import AnyFlowTransformer3DModel

TIME, DELTA = "condition_embedder.time_embedder.", "condition_embedder.delta_embedder."
PATCH, FAR = "patch_embedding.", "far_patch_embedding."


@overload
def load_network(
    source: str | Path,
    gate_value: float | None = None,
    deltatime_type: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    causal: None = None,
) -> AnyFlowTransformer3DModel: ...


@overload
def load_network(
    source: str | Path,
    gate_value: float | None = None,
    deltatime_type: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    *,
    causal: Mapping[str, Any],
) -> AnyFlowFARTransformer3DModel: ...


def load_network(
    source: str | Path,
    gate_value: float | None = None,
    deltatime_type: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
    causal: Mapping[str, Any] | None = None,
) -> Any:
    """The network of a Wan2.1 or AnyFlow pipeline folder, transformer folder or hub id, on the CPU.

    Args:
        source: what to load; its own config says what it is.
        gate_value, deltatime_type: for a Wan2.1 transformer, how the student takes its second time (0.25 and "r" where
            None). An AnyFlow checkpoint has its own; they must be None or equal to those.
        torch_dtype: of the weights, but for those that stay in float32.
        causal: asks for an `AnyFlowFARTransformer3DModel`, with any of its `full_chunk_limit`, `chunk_partition` and
            `compressed_patch_size`. Those of a causal checkpoint are its own; one that is given must be equal, but for
            the partition, which is that of the clips. None
            asks for an `AnyFlowTransformer3DModel`, which a causal checkpoint is not.

    Raises:
        UserError: there is no such network, it is of another kind, its keys do not fit, or its times or chunks are
            others.
    """
    place, arguments, kind = describe_source(source, gate_value, deltatime_type, causal)
    wanted = network_class(arguments)
    if kind == wanted.__name__:
        network = _load(wanted, source, place, torch_dtype)
        if "chunk_partition" in arguments:
            network.register_to_config(chunk_partition=tuple(arguments["chunk_partition"]))
        return network
    if kind == WanTransformer3DModel.__name__:
        weights = _with_delta(_load(WanTransformer3DModel, source, place, torch_dtype).state_dict())
    else:
        weights = _load(AnyFlowTransformer3DModel, source, place, torch_dtype).state_dict()
    return _with_weights(arguments, weights)


def from_wan(
    source: str | Path,
    *,
    gate_value: float = 0.25,
    deltatime_type: str = "r",
    torch_dtype: torch.dtype = torch.float32,
    causal: Mapping[str, Any] | None = None,
) -> Any:
    """A student that starts as a Wan2.1 text-to-video transformer.

    With `deltatime_type="r"` it is the teacher at `r = t`, whatever its gate; with "t-r" at gate 0 only. A causal one
    is that for a video of one chunk.

    Args:
        source: pipeline folder, transformer folder or hub id, in the layout of diffusers.
        gate_value, deltatime_type: as in `AnyFlowTransformer3DModel`.
        torch_dtype: of the weights, but for those that stay in float32.
        causal: as in `load_network`.

    Raises:
        UserError: there is no such network, it is of another kind (image-to-video), or its keys do not fit.
    """
    kind = locate(source)[1].get("_class_name")
    if kind != WanTransformer3DModel.__name__:
        raise UserError(str(source), f"holds a {kind}, where a WanTransformer3DModel is wanted")
    if causal is None:
        return load_network(source, gate_value, deltatime_type, torch_dtype)
    return load_network(source, gate_value, deltatime_type, torch_dtype, causal=causal)


def student_of(
    wan: WanTransformer3DModel,
    gate_value: float = 0.25,
    deltatime_type: str = "r",
    causal: Mapping[str, Any] | None = None,
) -> Any:
    """The student that starts as `wan`, whose weights it takes over (not copied; do not train `wan` after this).

    `causal` asks for a causal one, as in `load_network`.

    Raises:
        ValueError: `wan` is not a text-to-video transformer.
    """
    problem = unlike_text_to_video(wan.config)
    if problem is not None:
        raise ValueError(f"this WanTransformer3DModel {problem}")
    shared = {name: wan.config[name] for name in SHARED_CONFIG}
    times = {"gate_value": gate_value, "deltatime_type": deltatime_type}
    return _with_weights({**shared, **times, **chunk_arguments(causal)}, _with_delta(wan.state_dict()))


def _with_delta(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """With a second time embedder that begins as a copy of the first."""
    return {**weights, **{DELTA + k.removeprefix(TIME): w.clone() for k, w in weights.items() if k.startswith(TIME)}}


def _with_far_patch(weights: dict[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """With a patch embedding of the context that begins as the other one, resized."""
    weight = resized_patch(weights[f"{PATCH}weight"], arguments["compressed_patch_size"])
    return {**weights, f"{FAR}weight": weight, f"{FAR}bias": weights[f"{PATCH}bias"].clone()}


def _with_weights(arguments: Mapping[str, Any], weights: dict[str, Tensor]) -> Any:
    """A network that takes weights over; a causal one resizes the patch embedding for its context."""
    wanted = network_class(arguments)
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        network = wanted(**arguments)
    if wanted is AnyFlowFARTransformer3DModel:
        weights = _with_far_patch(weights, arguments)
    network.load_state_dict(weights, strict=True, assign=True)
    return network


def to_wan(network: AnyFlowTransformer3DModel) -> WanTransformer3DModel:
    """The Wan2.1 transformer that a network without a second time is (a teacher trained by stage 0).

    The weights are shared with `network`.

    Raises:
        ValueError: the gate is not 0, so that the second time matters.
    """
    config: Any = network.config
    if config.gate_value != 0:
        raise ValueError(f"gate_value is {config.gate_value}: only a network with gate 0 is a Wan2.1 transformer")
    if config.image_dim is not None:
        raise ValueError("a network with image_dim is not a Wan2.1 text-to-video transformer")
    wan = WanTransformer3DModel(**{name: config[name] for name in SHARED_CONFIG}, image_dim=None)
    weights = {key: weight for key, weight in network.state_dict().items() if not key.startswith(DELTA)}
    wan.load_state_dict(weights, strict=True, assign=True)
    return wan


def build_network(config: Mapping[str, Any], seed: int, time_frequency_limit: float | None = None) -> Any:
    """A network with random weights, a function of (config, seed) alone.

    Args:
        config: constructor arguments of the network, which is of the class that `network_class` says.
        seed: of the weights.
        time_frequency_limit: in radians per 1/1000 of time. Time features that turn faster start damped in proportion:
            left at full strength, a network that is trained from scratch becomes rough in time, and the difference
            quotient of the flow-map objective then measures that roughness.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = network_class(config)(**config)
    embedder = network.condition_embedder
    if time_frequency_limit is not None:
        _damp_fast_features(embedder.time_embedder, time_frequency_limit)
    embedder.delta_embedder.load_state_dict(embedder.time_embedder.state_dict())
    if isinstance(network, AnyFlowFARTransformer3DModel):
        network.load_state_dict(_with_far_patch(network.state_dict(), network.config))
    return network


def _damp_fast_features(embedder: TimestepEmbedding, limit: float) -> None:
    layer = embedder.linear_1
    count = layer.in_features // 2
    frequency = torch.exp(torch.arange(count) * (-math.log(10000.0) / count))
    with torch.no_grad():
        layer.weight.mul_((limit / frequency).clamp(max=1.0).repeat(2))  # the cosines, then the sines


def _load(network_class: type, source: str | Path, place: str | None, torch_dtype: torch.dtype) -> Any:
    """A network with every one of its weights from the file, and every weight of the file in it."""
    network, found = network_class.from_pretrained(
        source, subfolder=place, dtype=torch_dtype, use_safetensors=True, output_loading_info=True
    )
    for flaw in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found.get(flaw):
            named = ", ".join(str(key) for key in sorted(map(str, found[flaw]))[:3])
            raise UserError(str(source), f"{len(found[flaw])} {flaw.replace('_', ' ')} (such as {named})")
    return network
