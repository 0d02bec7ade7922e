"""Networks from files (a Wan2.1 transformer becomes a student, an AnyFlow checkpoint stays itself), and random ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from anyflow_train.errors import UserError
from anyflow_train.models.transformer import AnyFlowTransformer3DModel

SHARED_CONFIG = (
    "patch_size",
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "text_dim",
    "freq_dim",
    "ffn_dim",
    "num_layers",
    "cross_attn_norm",
    "eps",
    "rope_max_seq_len",
)
"""Constructor arguments that Wan2.1's transformer and the student have in common."""

_ONLY_VALUE = {
    "qk_norm": "rms_norm_across_heads",
    "added_kv_proj_dim": None,
    "image_dim": None,
    "pos_embed_seq_len": None,
}
"""What the other arguments of Wan2.1's transformer must be: a student has no place for anything else."""

TIME, DELTA = "condition_embedder.time_embedder.", "condition_embedder.delta_embedder."
TIMES = {"gate_value": 0.25, "deltatime_type": "r"}
"""How a student of a Wan2.1 transformer takes its second time, where nothing else is asked for."""


def load_network(
    source: str | Path,
    gate_value: float | None = None,
    deltatime_type: str | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> AnyFlowTransformer3DModel:
    """The network of a Wan2.1 or AnyFlow pipeline folder, transformer folder or hub id, on the CPU.

    Args:
        source: what to load; its own config says what it is.
        gate_value, deltatime_type: for a Wan2.1 transformer, how the student takes its second time (0.25 and "r" where
            None). An AnyFlow checkpoint has its own; they must be None or equal to those.
        torch_dtype: of the weights, but for those that stay in float32.

    Raises:
        UserError: there is no such network, it is of another kind, its keys do not fit, or its times are others.
    """
    place, arguments, kind = describe_source(source, gate_value, deltatime_type)
    if kind == AnyFlowTransformer3DModel.__name__:
        return _load(AnyFlowTransformer3DModel, source, place, torch_dtype)
    wan = _load(WanTransformer3DModel, source, place, torch_dtype)
    return student_of(wan, arguments["gate_value"], arguments["deltatime_type"])


def describe_source(
    source: str | Path, gate_value: float | None, deltatime_type: str | None
) -> tuple[str | None, dict[str, Any], str]:
    """The subfolder that holds the transformer, the constructor's arguments of the student, the stored class's name.

    The arguments and errors are `load_network`'s; no weight is read.
    """
    place, config = _locate(source)
    kind = str(config.get("_class_name"))
    given = {"gate_value": gate_value, "deltatime_type": deltatime_type}
    if kind == WanTransformer3DModel.__name__:
        problem = _unlike_text_to_video(config)
        if problem is not None:
            raise UserError(str(source), problem)
        times = {name: TIMES[name] if value is None else value for name, value in given.items()}
        return place, {**{name: config[name] for name in SHARED_CONFIG if name in config}, **times}, kind
    if kind != AnyFlowTransformer3DModel.__name__:
        raise UserError(str(source), f"holds a {kind}, where a Wan2.1 or AnyFlow transformer is wanted")
    for name, wanted in given.items():
        if wanted is not None and config[name] != wanted:
            raise UserError(str(source), f"was made with {name} = {config[name]!r}, and must be run with it")
    return place, {name: value for name, value in config.items() if not name.startswith("_")}, kind


def from_wan(
    source: str | Path,
    *,
    gate_value: float = 0.25,
    deltatime_type: str = "r",
    torch_dtype: torch.dtype = torch.float32,
) -> AnyFlowTransformer3DModel:
    """A student that starts as a Wan2.1 text-to-video transformer.

    With `deltatime_type="r"` it is the teacher at `r = t`, whatever its gate; with "t-r" at gate 0 only.

    Args:
        source: pipeline folder, transformer folder or hub id, in the layout of diffusers.
        gate_value, deltatime_type: as in `AnyFlowTransformer3DModel`.
        torch_dtype: of the weights, but for those that stay in float32.

    Raises:
        UserError: there is no such network, it is of another kind (image-to-video), or its keys do not fit.
    """
    kind = _locate(source)[1].get("_class_name")
    if kind != WanTransformer3DModel.__name__:
        raise UserError(str(source), f"holds a {kind}, where a WanTransformer3DModel is wanted")
    return load_network(source, gate_value, deltatime_type, torch_dtype)


def student_of(
    wan: WanTransformer3DModel, gate_value: float = 0.25, deltatime_type: str = "r"
) -> AnyFlowTransformer3DModel:
    """The student that starts as `wan`, whose weights it takes over (not copied; do not train `wan` after this).

    Raises:
        ValueError: `wan` is not a text-to-video transformer.
    """
    problem = _unlike_text_to_video(wan.config)
    if problem is not None:
        raise ValueError(f"this WanTransformer3DModel {problem}")
    weights = wan.state_dict()
    twin = {DELTA + k.removeprefix(TIME): w.clone() for k, w in weights.items() if k.startswith(TIME)}
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        shared = {name: wan.config[name] for name in SHARED_CONFIG}
        student = AnyFlowTransformer3DModel(**shared, gate_value=gate_value, deltatime_type=deltatime_type)
    student.load_state_dict({**weights, **twin}, strict=True, assign=True)
    return student


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


def build_network(
    config: Mapping[str, Any], seed: int, time_frequency_limit: float | None = None
) -> AnyFlowTransformer3DModel:
    """A network with random weights, a function of (config, seed) alone.

    Args:
        config: constructor arguments of `AnyFlowTransformer3DModel`.
        seed: of the weights.
        time_frequency_limit: in radians per 1/1000 of time. Time features that turn faster start damped in proportion:
            left at full strength, a network that is trained from scratch becomes rough in time, and the difference
            quotient of the flow-map objective then measures that roughness.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AnyFlowTransformer3DModel(**config)
    embedder = network.condition_embedder
    if time_frequency_limit is not None:
        _damp_fast_features(embedder.time_embedder, time_frequency_limit)
    embedder.delta_embedder.load_state_dict(embedder.time_embedder.state_dict())
    return network


def _damp_fast_features(embedder: TimestepEmbedding, limit: float) -> None:
    layer = embedder.linear_1
    count = layer.in_features // 2
    frequency = torch.exp(torch.arange(count) * (-math.log(10000.0) / count))
    with torch.no_grad():
        layer.weight.mul_((limit / frequency).clamp(max=1.0).repeat(2))  # the cosines, then the sines


def _locate(source: str | Path) -> tuple[str | None, dict[str, Any]]:
    """The subfolder of a source that holds the transformer (None: the source itself), and its config."""
    path = Path(source)
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or path.parts[:1] in [(".",), ("..",)]):
        raise UserError(str(source), "is neither a folder nor a hub id (owner/name)")
    for place in ("transformer", None):
        if path.is_dir() and not (path / (place or "") / "config.json").is_file():
            continue
        try:
            return place, _read_config(source, place)
        except OSError as error:
            reason = str(error).splitlines()[0]
            if path.is_dir():
                raise UserError(str(source), f"its config cannot be read: {reason}") from error
    if path.is_dir():
        raise UserError(str(source), "holds neither transformer/config.json nor config.json")
    raise UserError(str(source), f"no transformer can be loaded from the hub under this name: {reason}")


def _read_config(source: str | Path, place: str | None) -> dict[str, Any]:
    config: Any = AnyFlowTransformer3DModel.load_config(source, subfolder=place)
    return dict(config)


def _unlike_text_to_video(config: Mapping[str, Any]) -> str | None:
    for name, wanted in _ONLY_VALUE.items():
        if config.get(name, wanted) != wanted:
            return (
                f"has {name} = {config[name]!r}; a student can only start from a Wan2.1 text-to-video transformer, "
                f"where it is {wanted!r} (image-to-video checkpoints have key and value projections without a place)"
            )
    return None


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
